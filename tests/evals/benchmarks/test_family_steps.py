"""The table of a step in every family: real widths, one block, nothing left dense, rows that stay."""

from __future__ import annotations

import csv

import pytest
import torch

from dit_accel.evals.benchmarks import family_steps
from dit_accel.evals.benchmarks.family_steps import (
    CASES,
    Case,
    main,
    measure,
    one_block_each,
    sparse_everywhere,
)
from dit_accel.pipelines.families import families
from dit_accel.planning.model_config import published

HERE = {
    "cpu": {"name": "a CPU", "torch_threads": 1, "instructions": "AVX2"},
    "packages": {"dit-accel": "1", "torch": "2"},
    "python": "3",
    "commit": "abc",
}


def test_every_family_has_a_case():
    assert {case.family for case in CASES} == {family.name for family in families()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.variant)
def test_a_case_is_the_published_model_with_one_block_of_each_kind(case):
    whole = published(case.family, case.variant)
    model = one_block_each(whole)
    cut = model.transformer()
    lists = model.description.blocks(cut) if case.family != "z-image" else (cut.layers,)
    assert [len(blocks) for blocks in lists] == [1] * len(lists)
    layers = {n for n in model.config if whole.config.get(n) != model.config[n]}
    assert layers
    assert all("layers" in name or "blocks" in name for name in layers)
    grid = model.grid(cut, case.size)
    assert 0.1 < model.flops(cut, grid).attention / model.flops(cut, grid).total < 0.9
    least = 1_000 if case.family == "anyflow-far" else 5_000  # its own attention keeps all scores
    assert least < model.layout(grid).seq_len < 30_000
    recipe = sparse_everywhere(case.recipe)
    assert recipe.family == case.family
    assert not recipe.dense_layers
    assert not recipe.dense_steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untouched_and_accelerated_calls_are_measured_on_the_same_weights(monkeypatch, dtype):
    called = []
    monkeypatch.setattr(
        family_steps,
        "interleaved",
        lambda stock, ours, repeats, clock: (
            called.append((stock()[0], ours()[0])) or [(1, 2000, 3), (1, 500, 3)]
        ),
    )
    model = published("wan", "wan2.1-1.3b")
    small = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 8, "text_dim": 8, "num_layers": 2}
    monkeypatch.setattr(
        family_steps,
        "published",
        lambda *names: family_steps.dataclasses.replace(model, config={**model.config, **small}),
    )
    rows = measure(Case("wan", "wan2.1-1.3b", (9, 128, 128), "wan-radial"), dtype, 1, HERE)
    found = {r["metric"]: float(r["median"]) for r in rows}
    assert (found["heads"], found["head_dim"], found["tokens"]) == (2, 12, 192)
    assert (found["untouched_s"], found["accelerated_s"]) == (2.0, 0.5)
    assert 0 < found["block_density"] <= 1
    ((stock, ours),) = called
    assert stock.shape == ours.shape
    assert stock.dtype == ours.dtype == dtype
    assert stock.isfinite().all()


def test_families_measured_before_stay_in_the_table(monkeypatch, tmp_path, capsys):
    taken = iter([[(2.0, 4.0, 6.0), (1.0, 2.0, 3.0)]] * 3 + [[(8.0, 9.0, 9.0), (2.0, 3.0, 3.0)]])

    def measured(case, dtype, repeats, here):
        stock, ours = next(taken)
        values = (24, 128, 9216, 0.25, stock, ours)
        return [
            family_steps.row("family_step", "transformer", metric, case.shape(dtype), value, HERE)
            for metric, value in zip(family_steps.METRICS, values, strict=True)
        ]

    monkeypatch.setattr(family_steps, "measure", measured)
    run = ["--out", str(tmp_path), "--dtype"]
    assert main(["--family", "wan", *run, "bfloat16"]) == 0
    assert main(["--family", "flux", *run, "bfloat16"]) == 0
    assert main(["--family", "wan", *run, "float32"]) == 0
    assert main(["--family", "wan", *run, "bfloat16"]) == 0
    lines = [
        line for line in (tmp_path / "family_steps_cpu.md").read_text().splitlines() if "| 9216 |" in line
    ]
    assert [line.split(" | ")[0] for line in lines] == ["| flux.1-dev", *["| wan2.1-1.3b"] * 2]
    assert lines[0].endswith("| bfloat16 | 0.250 | 4.00 | 2.00 | 2.00x |")
    assert lines[1].endswith("| float32 | 0.250 | 4.00 | 2.00 | 2.00x |")
    assert lines[2].endswith("| bfloat16 | 0.250 | 9.00 | 3.00 | 3.00x |")
    with (tmp_path / "family_steps_cpu.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3 * len(family_steps.METRICS)


def test_an_unknown_family_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--family", "sana"])
    assert "wan-animate" in capsys.readouterr().err
