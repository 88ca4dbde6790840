"""`dit-accel plan`: densities, speed-up and memory of a recipe at a size, before anything is run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as opt
from . import plan_highres
from .errors import reported
from .output import JsonOption, note, print_json, print_table

if TYPE_CHECKING:
    from dit_accel.planning.parallel import Sharing
    from dit_accel.planning.plan import Plan
    from dit_accel.planning.speedups import Speedup

SCHEMA = "dit-accel/plan/1"
EXAMPLE = (
    "Example: dit-accel plan --family wan --size 1280x720 --frames 81 --recipe wan-radial --plot mask.png"
)


@reported
def plan(
    recipe: opt.RecipeOption = None,
    quantization: opt.QuantizationOption = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A bundled model or a local pipeline folder.")
    ] = None,
    family: Annotated[
        str | None,
        typer.Option("--family", help="Instead of a model: a family, such as flux, as published."),
    ] = None,
    variant: Annotated[
        str | None, typer.Option("--variant", help="A published model of the family, such as wan2.1-1.3b.")
    ] = None,
    size: opt.SizeOption = None,
    frames: opt.FramesOption = None,
    steps: opt.StepsOption = None,
    shift: Annotated[
        float | None,
        typer.Option("--shift", help="Of the noise schedule, for recipes by noise level; else the model's."),
    ] = None,
    device: Annotated[
        str,
        typer.Option("--device", help="What is planned for, cpu or cuda; need not be here. auto: what is."),
    ] = "auto",
    dtype: opt.DtypeOption = "auto",
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the mask of the first sparse layer into this PNG.")
    ] = None,
    highres: Annotated[
        str | None,
        typer.Option(
            "--highres", help="Instead: the stages of a run above the trained size by this method or preset."
        ),
    ] = None,
    strength: opt.StrengthOption = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus", min=1, max=1024, help="Also: bytes that so many GPUs send each other in a call."
        ),
    ] = None,
    link: Annotated[
        float | None,
        typer.Option("--link", help="GB that a GPU sends in a second, for the time of the exchange."),
    ] = None,
    call_seconds: Annotated[
        float | None,
        typer.Option(
            "--call-seconds", help="Measured time of a sparse call on one GPU, for a modelled time on --gpus."
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Say what a recipe would do to a model at a size: densities, speed-up, memory. Runs nothing.

    With --highres: time and peak memory of every stage of a run above the trained size; what a second of this
    machine computes is measured for it.

    Needs no weights and no GPU: the model is built from its configuration alone and its real forward is
    counted. Masks are really built, so their block densities are what kernels will pay; of very long
    sequences they are estimated from a part of each mask, which is then said.
    """
    from rich.console import Console

    from dit_accel.planning.parallel import sharings
    from dit_accel.planning.plan import plan as make
    from dit_accel.recipe.recipe import resolve

    opt.check_strength(strength)
    target, number = _target(device, dtype)
    found = opt.with_quantization(resolve(recipe) if recipe else None, quantization)
    chosen = {"model": model, "family": family, "variant": variant, "frames": frames, "steps": steps}
    chosen |= {"device": target, "dtype": number}
    if highres is not None:
        if plot is not None or shift is not None or gpus is not None:
            raise ValueError("`--plot`, `--shift` and `--gpus` do not go with `--highres`")
        return plan_highres.give(
            json, highres, opt.parse_size(size), strength=strength, recipe=found, **chosen
        )
    if found is None:
        raise ValueError("give `--recipe`, or `--highres` for a run above the trained size")
    if gpus is None and (link is not None or call_seconds is not None):
        raise ValueError("`--link` and `--call-seconds` are for `--gpus`; give that as well")
    if plot is not None:
        _check_plot(plot)
    with Console(stderr=True).status("building masks and counting FLOPs"):
        answer = make(
            found,
            size=opt.parse_size(size),
            shift=shift,
            **chosen,
        )
    shared = None if gpus is None else sharings(answer, found, gpus, link=link, call_seconds=call_seconds)
    if plot is not None:
        _draw(answer, plot)
    if json:
        plain = {"schema": SCHEMA, "plot": plot, **answer.to_dict()}
        return print_json(plain if shared is None else plain | {"gpus": [asdict(one) for one in shared]})
    _show(answer)
    if shared is not None:
        _show_shared(shared, link)
    return None


def _target(device: str, dtype: str):
    """The device type and the torch dtype that are planned for."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"`--device` must be auto, cpu or cuda, got {device!r}")
    if dtype not in opt.DTYPES:
        raise ValueError(f"`--dtype` must be one of {', '.join(opt.DTYPES)}, got {dtype!r}")
    target = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    automatic = "bfloat16" if target == "cuda" else "float32"
    return target, getattr(torch, automatic if dtype == "auto" else dtype)


def _check_plot(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise ValueError(f"`--plot` must end in .png, got {path.name!r}")
    opt.check_output(path)


def _draw(answer: Plan, path: Path) -> None:
    from dit_accel.files import atomic
    from dit_accel.masks.plot import draw

    if answer.sampled:
        raise ValueError(f"`--plot`: masks of {answer.tokens} tokens are not built; take a smaller size")
    if answer.mask is None:
        raise ValueError(
            f"recipe {answer.recipe} has no sparse layer on {answer.model}: there is no mask to draw"
        )
    with atomic(path) as temporary:
        title, orders = f"{answer.recipe}, {answer.tokens} tokens", answer.layer_attention.model_orders()
        draw(answer.mask, title, orders).save(temporary, format="PNG")
    note(f"mask: {path}")


# -- for people ----------------------------------------------------------------------------------------------


def _show(answer: Plan) -> None:
    frames, height, width = answer.size
    shape = f"{width}x{height}" + (f", {frames} frames" if frames > 1 else "")
    grid = " x ".join(map(str, answer.grid))
    rows = [
        ("model", f"{answer.model} ({answer.family}), {answer.heads} heads x {answer.head_dim}"),
        ("size", f"{shape}: {grid} tokens, {answer.tokens} in an attention layer, {answer.text_tokens} text"),
        ("planned for", f"{answer.device}, {answer.dtype}, blocks {'x'.join(map(str, answer.block_size))}"),
        ("steps", f"{answer.steps}, of them {answer.dense_steps} dense" + _levels(answer)),
        (
            "density",
            f"{answer.density:.4f} of all layers together, {answer.block_density:.4f} in blocks"
            + (", estimated" if answer.sampled else ""),
        ),
    ]
    print_table(f"Plan of {answer.recipe}", ("", ""), rows)
    print_table("Layers", ("layers", "pattern", "tokens", "density", "block density"), _layer_rows(answer))
    orders = [(o.pattern, o.tokens, o.order, f"{o.block_density:.4f}", o.takes) for o in answer.orders]
    print_table("Token orders", ("pattern", "tokens", "order", "block density", "takes"), orders)
    print_table("One call of the transformer, dense", ("", "TFLOP", "share"), _flops_rows(answer))
    columns = ("", "predicted", "from", "to", "ideal, with blocks at the cost of dense ones")
    print_table("Times faster than dense", columns, _speedup_rows(answer))
    memory = answer.memory
    rows = [
        ("weights", _size(memory.weights)),
        ("q, k, v and output of one layer", _size(memory.qkv_and_output)),
        ("all block masks", "not built" if memory.masks is None else _size(memory.masks)),
        ("scores of one layer, never made", _size(memory.scores_never_made)),
    ]
    print_table("Memory, batch of one", ("", ""), rows)
    for line in answer.notes:
        typer.echo(f"- {line}")


def _show_shared(shared: tuple[Sharing, ...], link: float | None) -> None:
    ways = {"heads": "heads (context_parallel)", "rows": "rows (patch_parallel)"}
    rows = [
        (ways[one.way], f"not possible: {one.refused}", *[""] * 4)
        if one.refused
        else (
            ways[one.way],
            _size(one.sent_bytes),
            _size(one.halo_bytes),
            f"{one.work:.1%}",
            "" if one.exchange_seconds is None else f"{one.exchange_seconds:.4g} s",
            "" if one.seconds is None else f"{one.seconds:.4g} s, {one.speedup:.2f} x",
        )
        for one in shared
    ]
    columns = ("shared by", "sent in a call", "of it rows", "work", "exchange", "a call, modelled")
    print_table(f"On {shared[0].gpus} GPUs, of the one that does most, batch of one", columns, rows)
    for one in shared:
        if one.imbalance is not None:
            typer.echo(
                f"- by heads, the GPU with most attention computes {one.imbalance:.2f} times the mean, with "
                f"neighbouring heads {one.neighbours:.2f}"
            )
    if link is not None:
        typer.echo(
            "- times on several GPUs are a model: one device's time divided as the work is, then the "
            f"exchange at {link:g} GB/s, nothing overlapped"
        )


def _levels(answer: Plan) -> str:
    levels = answer.noise_levels
    if levels is None:
        return ""
    shown = [f"{level:.3f}" for level in levels]
    return f", at noise levels {', '.join(shown if len(shown) <= 8 else [*shown[:4], '...', *shown[-2:]])}"


def _layer_rows(answer: Plan) -> list[tuple]:
    return [
        (
            group.names[0]
            if len(group.names) == 1
            else f"{group.names[0]} to {group.names[-1]} ({len(group.names)})",
            group.pattern or f"model's own attention: {group.reason}",
            group.tokens,
            f"{group.density:.4f}",
            f"{group.block_density:.4f}",
        )
        for group in answer.layers
    ]


def _flops_rows(answer: Plan) -> list[tuple]:
    flops = answer.flops
    parts = {
        "attention that recipes change": flops.attention,
        "other attention (cross-attention, text)": flops.other_attention,
        "linear layers and convolutions, projections included": flops.rest - flops.other_attention,
        "all": flops.total,
    }
    return [(name, f"{n / 1e12:.4g}", f"{n / flops.total:.1%}") for name, n in parts.items()]


def _speedup_rows(answer: Plan) -> list[tuple]:
    def cells(speedup: Speedup) -> list[str]:
        found = (speedup.predicted, speedup.low, speedup.high, speedup.ideal)
        return ["" if x is None else f"{x:.2f}" for x in found]

    names = {
        "attention, in sparse layers": answer.attention,
        "a sparse step": answer.step,
        f"a run of {answer.steps} steps": answer.run,
    }
    rows = [(name, *cells(speedup)) for name, speedup in names.items()]
    return [(name, predicted or "not measured", *others) for name, predicted, *others in rows]


def _size(count: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command(epilog=EXAMPLE)(plan)
