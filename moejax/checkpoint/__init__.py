"""Checkpoints of a run: saved while training goes on, verified bit by bit, restored on any mesh."""

from moejax.checkpoint.checkpoints import CheckpointConfig, Checkpoints, NoLoadableCheckpoint
from moejax.checkpoint.lock import RunInUse
from moejax.checkpoint.writer import SaveFailed

__all__ = ['CheckpointConfig', 'Checkpoints', 'NoLoadableCheckpoint', 'RunInUse', 'SaveFailed']
