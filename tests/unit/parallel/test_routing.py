"""Every student rank that needs rows is sent each of its sequences exactly once. The transport: test_teacher."""

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gkd.parallel.groups import Layout
from megatron_gkd.parallel.routing import plan_transfers, share


@st.composite
def layout_pairs(draw) -> tuple[Layout, Layout, int]:
    """Teacher and student on the same ranks, and a number of sequences that both can share out."""
    num_ranks = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))

    def layout() -> Layout:
        divisors = [d for d in range(1, num_ranks + 1) if num_ranks % d == 0]
        tp_size = draw(st.sampled_from(divisors))
        pp_size = draw(st.sampled_from([d for d in divisors if (num_ranks // tp_size) % d == 0]))
        return Layout(tp_size, pp_size, num_ranks)

    return layout(), layout(), num_ranks * draw(st.integers(1, 4))


@settings(deadline=None, max_examples=300)
@given(layout_pairs())
def test_each_last_stage_student_rank_gets_its_sequences_once_and_in_order(pair):
    teacher, student, num_sequences = pair
    plan = plan_transfers(teacher, student, num_sequences)
    arriving: dict[int, list[int]] = {}
    for transfer in plan:
        arriving.setdefault(transfer.dst, []).extend(range(transfer.start, transfer.stop))
    per_copy = num_sequences // student.dp_size
    expected = {
        rank: list(range(per_copy * copy, per_copy * (copy + 1)))
        for copy in range(student.dp_size)
        for rank in student.last_stage_ranks(copy)
    }
    assert arriving == expected


@settings(deadline=None, max_examples=300)
@given(layout_pairs())
def test_a_sender_is_on_the_teachers_last_stage_and_holds_what_it_sends(pair):
    teacher, student, num_sequences = pair
    per_copy = num_sequences // teacher.dp_size
    for transfer in plan_transfers(teacher, student, num_sequences):
        _, copy, stage = teacher.coordinates(transfer.src)
        assert stage == teacher.pp_size - 1
        assert per_copy * copy <= transfer.start < transfer.stop <= per_copy * (copy + 1)


@settings(deadline=None)
@given(layout_pairs())
def test_nothing_travels_between_equal_layouts(pair):
    layout, _, num_sequences = pair
    assert all(t.src == t.dst for t in plan_transfers(layout, layout, num_sequences))


def test_receivers_in_other_places_spread_over_the_senders():
    """Two student ranks need the same rows; neither holds them, so two teacher ranks send one each."""
    teacher, student = Layout(2, 2, 4), Layout(2, 1, 4)
    plan = plan_transfers(teacher, student, 2)
    assert {t.dst: t.src for t in plan} == {0: 2, 1: 3, 2: 2, 3: 3}


@given(st.integers(1, 6), st.integers(1, 6))
def test_shares_are_consecutive_and_equal(num_copies: int, size: int):
    shares = [share(num_copies * size, copy, num_copies) for copy in range(num_copies)]
    assert [n for start, stop in shares for n in range(start, stop)] == list(range(num_copies * size))
    assert {stop - start for start, stop in shares} == {size}
