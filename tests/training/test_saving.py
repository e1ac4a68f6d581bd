"""When a state is saved, and where."""

from qi2_jax.training.saving import Save, SaveSchedule


def test_the_last_step_and_every_interval_are_persistent_and_local_saves_lie_between():
    schedule = SaveSchedule(every=6, local_every=2)
    due = {step: schedule.due(step, last=step == 13) for step in range(1, 14)}
    assert {step for step, save in due.items() if save is Save.PERSISTENT} == {6, 12, 13}
    assert {step for step, save in due.items() if save is Save.LOCAL} == {2, 4, 8, 10}
    assert SaveSchedule(every=6).due(2, last=False) is None
