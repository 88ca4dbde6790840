from dit_accel.bounded_dict import make_room


def test_keeps_the_latest_and_drops_none_too_early():
    kept = {}
    for number in range(7):
        make_room(kept, 4)
        kept[number] = None
        assert list(kept) == list(range(max(0, number - 3), number + 1))
