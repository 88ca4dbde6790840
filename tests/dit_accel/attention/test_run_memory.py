"""What layers keep between the steps of a run: by branch, as a call found it however often it is run."""

from dit_accel.attention.run_memory import RunMemory


def test_branches_of_an_evaluation_find_their_own():
    memory = RunMemory()
    for step in range(3):
        for branch in ("cond", "uncond"):
            call = memory.call("transformer", step).within("layer")
            found = call.recall()
            assert found == ((branch, step - 1) if step else None)
            call.keep((branch, step))


def test_transformers_layers_and_keys_are_apart():
    memory = RunMemory()
    first = memory.call("transformer", 0)
    first.within("a").keep(1)
    first.within("a").keep(2, "other")
    later = memory.call("transformer", 1)
    assert later.within("a").recall() == 1
    assert later.within("a").recall("other") == 2
    assert later.within("b").recall() is None
    assert memory.call("transformer_2", 1).within("a").recall() is None


def test_what_runs_again_in_a_call_finds_the_same():
    memory = RunMemory()
    memory.call("transformer", 0).within("a").keep(1)
    call = memory.call("transformer", 1)
    for again in range(3):
        assert call.within("a").recall() == 1
        call.within("a").keep(2 + again)
    later = memory.call("transformer", 2)
    later.within("a").keep(9)
    assert call.within("a").recall() == 1  # in the backward pass of an earlier call
    assert memory.call("transformer", 3).within("a").recall() == 9


def test_a_key_seen_for_the_first_time_in_a_call_stays_unseen_in_it():
    call = RunMemory().call("transformer", 0).within("a")
    assert call.recall() is None
    call.keep(1)
    assert call.recall() is None
