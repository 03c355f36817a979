"""Text to Batch: sources, mixture, tokenizer, token cache, pipeline.

Only Batch is exported here: models read it, and they must load neither Grain nor a tokenizer.
"""

from moejax.data.batch import IGNORE, Batch

__all__ = ['IGNORE', 'Batch']
