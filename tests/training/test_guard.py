"""Which steps are refused."""

from sid_train.training.guard import NormGuard


def fed(guard, norms):
    return [guard.refuses("generator", norm) for norm in norms]


def test_a_spike_is_refused_and_said_and_does_not_count():
    guard = NormGuard(["generator", "fake_score"], limit=10)
    assert not any(fed(guard, [1.0, 2.0] * 10))
    assert "1e+06, is 666,667 times the median of the last 20" in guard.refuses("generator", 1e6)
    assert guard.refuses("fake_score", 1e6) == ""  # each network has its own
    assert guard.refuses("generator", 14.9) == ""
    assert guard.refuses("generator", 20.1)  # now the median of 21 is 2


def test_the_first_steps_may_grow_from_nothing():
    assert not any(fed(NormGuard(["generator"], limit=2), [10.0**n for n in range(-10, 10)]))


def test_a_network_whose_gradients_stay_long_goes_on():
    guard = NormGuard(["generator"], limit=10)
    fed(guard, [1.0] * 20)
    told = fed(guard, [100.0] * 15)
    assert all(told[:10])
    assert not any(told[10:])
    assert "from now on" in told[9]


def test_no_limit_refuses_nothing():
    assert not any(fed(NormGuard(["generator"], limit=0), [1.0] * 30 + [1e30]))


def test_a_checkpoint_keeps_what_was_seen():
    guard, other = (NormGuard(["generator", "fake_score"], limit=10) for _ in range(2))
    fed(guard, [1.0] * 25 + [500.0] * 3)
    other.set_state(guard.get_state())
    assert (other.norms, other.refused) == (guard.norms, guard.refused)
    assert other.refuses("generator", 500.0)
