"""The comparison table and its counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_jax.report.table import comparison_table, conclusions, human_count


def test_table_of_an_example():
    result = {
        "slim": {"top1": 0.98104, "macs": 6_000_000, "params": 130_000, "seconds": 3},
        "seed": 0,
        "subnet": {"top1": 0.985, "macs": 4_000_000, "params": 61_728},
        "dense": {"top1": 0.98107, "macs": 8_123_456, "params": 123_456},
        "uniform": {"top1": 0.9715, "macs": 4_100_000, "params": 70_000},
        "settings": {"epochs": 3},
    }
    assert comparison_table(result).splitlines() == [
        "model     top-1 %   change     MACs   fewer MACs     params   fewer params",
        "dense       98.11            8.12 M                123.46 k",
        "slim        98.10    +0.00   6.00 M       26.1 %   130.00 k         -5.3 %",
        "uniform     97.15    -0.96   4.10 M       49.5 %    70.00 k         43.3 %",
        "subnet      98.50    +0.39   4.00 M       50.8 %    61.73 k         50.0 %",
    ]


def test_table_shows_intervals_where_they_are_known():
    def against(**points):
        return {name: {"top1": [p / 100 for p in three]} for name, three in points.items()}

    cost = {"macs": 4_000_000, "params": 70_000}
    baseline = {"against": against(dense=(-1, -2, -1e-9)), "agreement": 0.98}
    intervals = against(uniform_=(0.5, -0.25, 1.25), dense=(-0.5, -1.11, 0.22))
    intervals["uniform 0.55"] = intervals.pop("uniform_")
    result = {
        "dense": {"top1": 0.99, "macs": 8_000_000, "params": 140_000},
        "subnet": [
            {"budget": [0.5, 0.55], "top1": 0.985, **cost, "against": intervals, "agreement": 1.0}
        ],
        "uniform": [{"budget": [0.5, 0.55], "top1": 0.98, **cost, **baseline}],
        "seeds": [0, 1],
    }
    lines = comparison_table(result).splitlines()
    assert [line[:87].rstrip() for line in lines] == [
        "model          top-1 %   change   95 % interval   against uniform (95 %)   agreement",
        "dense            99.00",
        "uniform 0.55     98.00    -1.00    -2.00..+0.00                              98.00 %",
        "subnet 0.55      98.50    -0.50    -1.11..+0.22     +0.50 (-0.25..+1.25)    100.00 %",
    ]
    assert max(map(len, lines)) <= 140


def test_table_shows_latency_and_compares_with_the_first_model_there_is():
    slim, moved = (
        {"top1": top1, "macs": macs, "params": 8, "ms": ms}
        for top1, macs, ms in ((0.9, 8, 20.0), (0.8, 2, 15.0))
    )
    header, first, second = comparison_table({"moved": moved, "slim": slim}).splitlines()
    assert header.endswith("ms   fewer ms")
    assert (first.split()[0], first.split()[-1]) == ("slim", "20.00")
    assert second.split()[:5] == ["moved", "80.00", "-10.00", "2", "75.0"]
    assert second.endswith("15.00     25.0 %")


def test_conclusions_are_of_the_smallest_models():
    dense = {"top1": 0.9, "macs": 8_000_000, "params": 8}
    slim = {"top1": 0.9, "macs": 6_000_000, "params": 6}
    subnets = [
        {"budget": [0.2, low], "top1": 0.9 - low / 10, "macs": round(8e6 * low), "params": 4}
        for low in (0.25, 0.5)
    ]
    subnets[1]["against"] = {"dense": {"top1": [-0.05, -0.0625, 0.01]}}
    assert conclusions({"subnet": subnets, "dense": dense, "slim": slim}) == [
        "subnet 0.25: 75.0 % fewer MACs than dense; top-1 accuracy 87.50 %, change -2.50 points.",
        "subnet 0.5: 50.0 % fewer MACs than dense; top-1 accuracy 85.00 %, change -5.00 points "
        "(95 % interval -6.25..+1.00).",
    ]
    assert conclusions({"dense": dense, "slim": slim}) == [
        "slim: 25.0 % fewer MACs than dense; top-1 accuracy 90.00 %, change +0.00 points."
    ]
    assert conclusions({"transfer": dense}) == ["transfer: top-1 accuracy 90.00 %, 8.00 M MACs."]


def test_table_needs_a_complete_entry():
    with pytest.raises(ValueError, match="no entry has macs, params, top1; entries: dense"):
        comparison_table({"dense": {"top1": 0.9}})


@pytest.mark.parametrize(
    "count, text",
    [(0, "0"), (999, "999"), (999_994, "999.99 k"), (999_995, "1.00 M"), (2.5e15, "2500.00 T")],
)
def test_human_count(count, text):
    assert human_count(count) == text


@given(st.integers(1, 10**14))
def test_human_count_keeps_three_digits_or_more(count):
    text = human_count(count)
    number, _, symbol = text.partition(" ")
    value = float(number) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[symbol]
    assert value == pytest.approx(count, rel=0.005)
    assert float(number) < 1000
