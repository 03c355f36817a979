"""What a run survives: each fault, what a run makes of it, and the tests that show it."""

from typing import NamedTuple


class Row(NamedTuple):
  """A fault, what a run makes of it, and its tests, as FOLDER/FILE::NAME in tests/, without
  `test_`."""

  fault: str
  behaviour: str
  tests: tuple[str, ...]

  def nodes(self) -> list[str]:
    """The tests of the row, as pytest names them, without their parameters."""
    nodes = []
    for test in self.tests:
      path, _, name = test.partition('::')
      folder, _, file = path.rpartition('/')
      nodes.append(f'tests/{folder}/test_{file}.py::test_{name}')
    return nodes


ROWS = (
  Row(
    '300 steps with nine faults: kill -9 at random steps, while a save is in flight, before it has '
    'its name and while an old step is deleted; SIGTERM; a full disk',
    'the same command goes on; metrics and last digest are those of the run without it, to the bit',
    ('system/faults::a_soak_ends_as_if_nothing_had_happened',),
  ),
  Row(
    'SIGTERM, SIGINT, or SIGHUP (a closed ssh; under nohup it is ignored) to the trainer',
    'saves within a step; exit 143, 130 or 129',
    ('system/faults::a_signal_saves_within_a_step',),
  ),
  Row(
    'the same while it imports, tokenises or compiles',
    'ends at once, there being nothing to save',
    (
      'runtime/signals::a_signal_is_heard_while_the_main_thread_is_outside_of_python',
      'runtime/signals::a_signal_ends_at_once_where_there_is_nothing_to_save',
    ),
  ),
  Row(
    'stdout closed (piped into head) or on a full disk',
    'one warning on stderr, and training goes on',
    (
      'system/faults::a_closed_stdout_ends_no_run',
      'runtime/steady_output::a_full_disk_is_told_once_and_so_is_room',
      'runtime/steady_output::a_process_ends_well_whatever_became_of_its_output',
    ),
  ),
  Row(
    'disk full before the first step',
    'one line; exit 1',
    ('system/trainer::a_disk_that_is_full_before_the_first_step_is_one_line',),
  ),
  Row(
    'SIGTERM twice',
    'the second ends it at once; exit 143',
    ('system/faults::a_second_signal_ends_at_once',),
  ),
  Row(
    'SIGTERM to one of two processes',
    'both stop at the same step, saved; exit 143',
    ('system/processes::a_signal_to_one_stops_both_at_one_step',),
  ),
  Row(
    'kill -9 of one of two processes',
    'the other ends soon after the heartbeat; the same command goes on',
    ('system/processes::a_process_that_dies_ends_the_other_and_the_same_command_goes_on',),
  ),
  Row(
    'disk full during a save',
    'a line and a metric, and training goes on; exit 1 if it was the last save',
    (
      'system/save_faults::a_full_disk_fails_saves_until_there_is_room',
      'system/save_faults::a_save_that_fails_is_a_line_and_a_metric_and_the_last_one_a_status',
    ),
  ),
  Row(
    'a save that fails in one of two processes',
    'none has saved and none waits; exit 1 if it was the last save',
    ('system/save_faults::where_one_process_cannot_save_none_has_saved_and_none_waits',),
  ),
  Row(
    'disk full for logs',
    'one warning; whole lines are lost until there is room, and nothing else',
    (
      'system/faults::logs_on_a_full_disk_cost_lines_and_nothing_else',
      'train/telemetry/metrics_log::what_does_not_fit_is_lost_whole_and_told_once',
    ),
  ),
  Row(
    'a save that no reader would find, as where the index was not written',
    'read back before it gets its name: a failed save, as above',
    (
      'checkpoint/writer::a_save_that_a_reader_would_not_find_has_failed',
      'checkpoint/writer::any_legal_name_of_a_directory_is_saved_to_and_read_from',
    ),
  ),
  Row(
    'truncated file, flipped bit, missing file in a checkpoint',
    'leaf and file named; the newest step that verifies',
    (
      'system/save_faults::damage_is_named_and_the_newest_good_step_is_used',
      'checkpoint/checkpoints::a_damaged_file_is_named_with_its_leaf_and_the_step_before_is_used',
    ),
  ),
  Row(
    'empty or foreign directories among the checkpoints',
    'ignored, each with one warning',
    (
      'system/save_faults::damage_is_named_and_the_newest_good_step_is_used',
      'checkpoint/checkpoints::foreign_directories_are_ignored_with_a_warning',
    ),
  ),
  Row(
    'every checkpoint bad',
    'refuses to start over; exit 3',
    ('system/save_faults::without_a_good_step_a_run_is_not_started_over',),
  ),
  Row(
    'model, dtype, data, tokenizer or batch not as in the checkpoint',
    'refuses with old and new; exit 2',
    (
      'system/save_faults::what_is_not_as_in_the_checkpoint_is_refused',
      'system/save_faults::another_seed_is_refused_and_accepted_when_asked_for',
    ),
  ),
  Row(
    'NaN or inf in loss or gradient; a spike (optim.skip_spikes); a NaN validation',
    'the step changes no bit of parameters, optimiser and router, and is counted; never the best '
    'checkpoint',
    (
      'system/faults::bad_steps_are_skipped_and_a_bad_validation_is_never_the_best',
      'system/faults::a_bad_best_does_not_push_out_a_good_one',
      'train/step/train_step::a_spike_changes_nothing_where_it_is_to_be_skipped',
    ),
  ),
  Row(
    'so many bad steps in a row (stop_after_skips)',
    'gives up; exit 4',
    ('system/faults::too_many_bad_steps_in_a_row_end_the_run',),
  ),
  Row(
    'torn or corrupted token cache; source text changed',
    'made again from the source; exit 2 where that cannot be',
    ('system/run_directory::a_damaged_cache_is_made_again_and_damaged_text_is_named',),
  ),
  Row(
    'two trainers on one directory; readers while one saves',
    'the second exits 5 naming the first; readers delete nothing',
    (
      'system/run_directory::a_second_trainer_is_turned_away_and_readers_are_not',
      'checkpoint/checkpoints::a_step_deleted_under_a_reader_is_no_damage',
      'checkpoint/checkpoints::a_reader_changes_nothing',
    ),
  ),
  Row(
    'a hang (hang_after)',
    'stacks of all threads; exit 6',
    (
      'system/faults::a_hang_is_told_with_all_stacks',
      'runtime/watchdog::what_ends_a_process',
    ),
  ),
  Row(
    'pickles, ../, absolute paths and links in what is read; a name with a path in it',
    'refused',
    (
      'system/run_directory::ids_and_probes_are_never_unpickled',
      'system/run_directory::a_run_is_named_by_a_directory',
      'system/run_directory::a_link_in_the_place_of_a_file_to_be_written_keeps_its_target',
      'system/run_directory::what_a_reader_of_a_run_cannot_trust_is_one_error',
      'checkpoint/checkpoints::a_link_inside_a_step_is_not_followed',
      'checkpoint/checkpoints::a_pickle_in_place_of_a_file_is_never_run',
      'hf/safetensors/directory::what_cannot_be_trusted_is_refused_in_one_message',
      'hf/safetensors/directory::a_pickle_is_never_run',
    ),
  ),
  Row(
    'all tokens to one expert, experts without a token, nearly everything dropped',
    'finite gradients; one alarm with its remedy',
    (
      'train/telemetry/collapse_alarms::gradients_stay_finite',
      'train/telemetry/collapse_alarms::a_run_that_collapses_says_so_and_goes_on',
    ),
  ),
)
