"""Seeds affect the results of runs, so neither `mix` nor the purposes may change (tests/data/stream/test_order.py pins
`random_bits`)."""

from dist_t2i.utils.seeds import Purpose, StreamPurpose, mix


def test_mix_does_not_change():
    assert mix(0, 1, 2) == 8825289091277911490
    assert mix(1) != mix(1, 0)


def test_no_two_purposes_share_a_value():
    assert len(Purpose.__members__) == len(Purpose) and len(StreamPurpose.__members__) == len(StreamPurpose)


def test_values_of_purposes_do_not_change():
    assert [purpose.value for purpose in Purpose][:6] == [1, 2, 3, 4, 5, 6]
    assert [purpose.value for purpose in StreamPurpose] == [1, 2, 100, 101, 102, 103, 104, 110, 111, 0x4D495854]
