"""`dit-accel models | recipes | env`: what is here and what can run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import reported
from .output import JsonOption, print_json, print_table

if TYPE_CHECKING:
    from dit_accel.recipe.recipe import Recipe


def _size(size: dict[str, int]) -> str:
    frames, height, width = size.values()
    return f"{width}x{height}" + (f", {frames} frames" if frames > 1 else "")


@reported
def models(json: JsonOption = False) -> None:
    """List the bundled models."""
    from dit_accel.pipelines import tiny

    rows = [_describe_model(name, info, tiny.weights_dir(name)) for name, info in tiny.INFO.items()]
    if json:
        return print_json({"models": rows})
    keys = ("name", "family", "native", "demo", "megabytes", "description")
    table = [[_size(row[key]) if key in ("native", "demo") else row[key] for key in keys] for row in rows]
    columns = ("name", "family", "native size", "demo size", "MB", "description")
    print_table("Bundled models; any diffusers pipeline folder or hub id works as well", columns, table)
    return None


def _describe_model(name: str, info: Any, folder: Path) -> dict[str, Any]:
    axes = ("frames", "height", "width")
    return {
        "name": name,
        "family": info.family,
        "native": dict(zip(axes, info.native, strict=True)),
        "demo": dict(zip(axes, info.demo, strict=True)),
        "steps": info.steps,
        "guidance": info.guidance,
        "megabytes": round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6, 1),
        "description": info.description,
        "folder": folder,
    }


recipes = typer.Typer(
    no_args_is_help=False,
    invoke_without_command=True,
    help="List the named recipes, or show one as YAML.",
    epilog="Example: dit-accel recipes show NAME > my-recipe.yaml",
)


def _describe(name: str, recipe: Recipe) -> dict[str, Any]:
    data = recipe.to_dict()
    settings = {key: value for key, value in data.items() if key not in ("name", "family", "source")}
    return {"name": name, "family": recipe.family, "source": recipe.source, **settings}


def _summary(recipe: Recipe) -> str:
    """What a recipe does, in a line."""
    chosen = recipe.attention if isinstance(recipe.attention, dict) else {"": recipe.attention}
    parts = [f"{selector}: {pattern}" if selector else str(pattern) for selector, pattern in chosen.items()]
    parts += [
        f"{name}={value}"
        for name in ("dense_layers", "dense_steps", "quantization", "tail")
        if (value := getattr(recipe, name)) not in (None, 0, ())
    ]
    parts += [] if recipe.adapter is None else [f"adapter={recipe.adapter.file()}"]
    return ", ".join(parts)


@recipes.callback()
@reported
def list_recipes(
    context: typer.Context,
    family: Annotated[str | None, typer.Option("--family", help="Only this family: flux, wan, ...")] = None,
    highres: Annotated[
        bool, typer.Option("--highres", help="Instead: the presets of `generate --highres`.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """List the named recipes, or show one as YAML."""
    if context.invoked_subcommand:
        return None
    if highres:
        return _list_highres(family, json)
    from dit_accel import presets

    known = presets(family)
    if family is not None and not known:
        families = sorted({recipe.family for recipe in presets().values() if recipe.family})
        raise ValueError(f"no recipe is for the family {family!r}; the families are {', '.join(families)}")
    if json:
        return print_json({"recipes": [_describe(*item) for item in known.items()]})
    rows = [(name, recipe.family or "any", _summary(recipe), recipe.source) for name, recipe in known.items()]
    print_table("Recipes", ("name", "family", "what it does", "source"), rows)
    return None


def _list_highres(family: str | None, json: bool) -> None:
    import dataclasses

    from dit_accel.highres import presets

    known = presets(family).values()
    if json:
        return print_json({"presets": [dataclasses.asdict(preset) for preset in known]})
    rows = [(preset.name, preset.family, preset.describe(), preset.source) for preset in known]
    print_table("Above native size", ("name", "family", "what it does", "source"), rows)
    return None


@recipes.command(epilog="Example: dit-accel recipes show NAME > my-recipe.yaml")
@reported
def show(
    name: Annotated[str, typer.Argument(help="A preset's name or a recipe file.")],
    json: JsonOption = False,
) -> None:
    """Print a recipe as YAML, ready to save and edit."""
    from dit_accel.recipe.recipe import resolve

    recipe = resolve(name)
    if json:
        return print_json(recipe.to_dict())
    typer.echo(recipe.to_yaml().rstrip())
    return None


@reported
def env(json: JsonOption = False) -> None:
    """Show versions, devices, and which attention backends can run here and why not."""
    from dit_accel.environment import environment
    from dit_accel.kernels import support_table

    answer = environment()
    answer["backends"] = support_table()
    if json:
        return print_json(answer)
    rows = [("python", answer["python"])]
    rows += [(name, number or "not installed") for name, number in answer["packages"].items()]
    cpu = answer["cpu"]
    rows += [("commit", answer["commit"] or "not a checkout"), ("platform", answer["platform"])]
    rows += [("cpu", f"{cpu['name']}, {cpu['cores']} cores, {cpu['torch_threads']} torch threads")]
    rows += [
        ("gpu", f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory_gib']} GiB")
        for gpu in answer["gpus"]
    ]
    rows += [] if answer["gpus"] else [("gpu", "none")]
    print_table("Environment", ("", ""), rows)
    merged: dict[tuple[str, str, str], list[str]] = {}
    for row in answer["backends"]:
        gradients = row["gradients"] if row["status"] == "yes" else ""
        key = row["backend"], row["device"], row["status"], gradients
        merged.setdefault(key, []).append(row["dtype"])
    backends = [(*key[:2], ", ".join(dtypes), *key[2:]) for key, dtypes in merged.items()]
    headings = ("backend", "device", "dtypes", "runs here", "gradients")
    print_table("Attention backends", headings, backends)
    return None


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command(epilog="Example: dit-accel models --json")(models)
    app.add_typer(recipes, name="recipes")
    app.command(epilog="Example: dit-accel env --json")(env)
