"""What is done in the minutes on a GPU, in which order, and which share of the time each phase has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dit_accel.kernels.block_sparse.tuned import BACKWARD_PARTS, Launch
from dit_accel.patterns import Dense

from . import cases, launches, steps
from .cases import Case
from .job import Job
from .peers import ERRORS, OTHER_KERNELS, PROVIDERS, kernel

PHASES = ("check", "rate", "shapes", "backward", "grid", "backward grid", "steps", "profile")
GRIDS = {"grid": ("forward",), "backward grid": BACKWARD_PARTS}  # the parts of attention launched in each
SHARES = {  # of the time left when a phase begins, against those that follow it
    "cuda": dict(zip(PHASES, (20, 11, 22, 10, 17, 7, 8, 5), strict=True)),
    "cpu": dict(zip(PHASES, (45, 9, 9, 6, 7, 5, 17, 2), strict=True)),
}
SECONDS = {  # that a job may take before its process is ended
    "cuda": dict(zip(PHASES, (100, 60, 60, 60, 30, 30, 90, 40), strict=True)),
    # a CPU may have other work to do
    "cpu": dict(zip(PHASES, (120, 60, 60, 60, 60, 60, 120, 30), strict=True)),
}
HANG = 6  # seconds for a job that is there to hang
YARDSTICKS = {"cuda": ("sdpa-cudnn", "sdpa-flash"), "cpu": ("sdpa-flash", "sdpa-math")}
PEERS = {  # on a CPU FlexAttention would compile for half a minute
    "cuda": ("flex", "flash-attn", "flash-attn-4", "fa4", "sageattention", "xformers"),
    "cpu": ("flash-attn",),
}
OTHERS = {  # kernels of ours, where there are peers
    "cuda": (
        *OTHER_KERNELS, *(f"{name}-int8" for name in OTHER_KERNELS), "triton-tma-int8-fp8",
        *(f"{name}-tail" for name in ("triton", *OTHER_KERNELS)),
    ),
    "cpu": ("gather-tail",),
}  # fmt: skip
OTHERS_BACKWARD = {"cuda": ("triton-tma",), "cpu": ()}  # backward passes of ours
QUANTIZED = {"cuda": tuple(ERRORS), "cpu": ("int8",)}  # formats of ours, where there are peers too
SHAPES_WITH_PEERS = 3  # the first ones; FlexAttention compiles anew for each
BACKWARD_PEERS = {"cuda": ("flex",), "cpu": ()}  # beside the yardsticks


@dataclass(frozen=True)
class Phases:
    """Every phase of a run but those that depend on what came before."""

    checks: list[Job]
    rate: list[Job]
    shapes: list[Job]
    backward: list[Job]
    steps: list[Job]


def of(device: str) -> Phases:
    """What is done on a device; on a CPU, a rehearsal with what it must survive."""
    if device == "cpu":
        checks = [*faults(), _check("fp32", [64]), _check("bf16", [16]), _check_gradients("fp32", [64])]
        grids = *launches.REHEARSAL_GRID, *launches.REHEARSAL_BACKWARD_GRID
        checks += [_check_launch(launch, "fp32", [64]) for launch in grids]
        rate, shapes, models = cases.REHEARSAL["rate"], cases.REHEARSAL["shapes"], steps.REHEARSAL
    else:
        checks = [_check("bf16", [64, 128, 72]), _check("fp16", [64, 128]), _check("fp32", [64, 128])]
        checks += [_check("bf16", [16, 256])]
        checks += [_check_gradients("bf16", [64, 128, 256]), _check_gradients("fp16", [72, 128])]
        checks += [_check_gradients("fp32", [64, 128])]
        checks += [_check_gradients("bf16", [64, 128], other) for other in OTHERS_BACKWARD[device]]
        grids = *launches.GRID, *launches.BACKWARD_GRID
        checks += [_check_launch(launch, "bf16", [64, 128]) for launch in grids]
        rate, shapes, models = cases.RATE, cases.SHAPES, steps.STEPS
    again = _attention(rate[0], YARDSTICKS[device][0])  # throttling would show
    return Phases(
        checks,
        [Job("matmul", "matmul"), *_timed(rate, device, len(rate)), again],
        _timed(shapes, device, SHAPES_WITH_PEERS),
        _backward([*rate, *shapes[:SHAPES_WITH_PEERS]], device),
        [Job("step", step.name, {"step": step.name}) for step in models],
    )


def limit(device: str, phase: str, job: Job) -> float:
    """Seconds that a job may take before its process is ended."""
    return HANG if job == _fault("hang") else SECONDS[device][phase]


def faults() -> list[Job]:
    """What a rehearsal must survive: a process that hangs, one that crashes, and one whose GPU is lost."""
    kinds = ("hang", "crash", "an illegal memory access")
    return [_fault(what) for what in kinds]


def _fault(what: str) -> Job:
    return Job("fault", f"fault: {what}", {"what": what})


def _check(dtype: str, head_dims: list[int]) -> Job:
    name = f"check {dtype}, head_dim {', '.join(map(str, head_dims))}"
    return Job("check", name, {"dtype": dtype, "head_dims": head_dims})


def _check_gradients(dtype: str, head_dims: list[int], backend: str | None = None) -> Job:
    of = f" of {backend}" if backend else ""
    name = f"check gradients{of} {dtype}, head_dim {', '.join(map(str, head_dims))}"
    return Job("check gradients", name, {"dtype": dtype, "head_dims": head_dims, "backend": backend})


def _check_launch(launch: Launch, dtype: str, head_dims: list[int]) -> Job:
    arguments = {"launch": list(launch), "dtype": dtype, "head_dims": head_dims}
    kind = "check launch" if launch.part == "forward" else "check backward launch"
    return Job(kind, f"check {launches.describe(launch)}", arguments)


def _timed(chosen: Iterable[Case], device: str, with_peers: int) -> list[Job]:
    """On each case the yardsticks, then ours, and on the first ones our others and installed peers."""
    peers = [*OTHERS[device], *(f"{kernel(device)}-{format}" for format in QUANTIZED[device])]
    peers += [name for name in PEERS[device] if PROVIDERS[name].missing() is None]
    return [
        _attention(case, name)
        for number, case in enumerate(chosen)
        for name in (*YARDSTICKS[device], kernel(device), *(peers if number < with_peers else ()))
        if _of_use(name, case)
    ]


def _of_use(name: str, case: Case) -> bool:
    """Whether a provider is timed on a case: one with a tail not where nothing is left out."""
    return PROVIDERS[name].tail is None or not isinstance(case.pattern, Dense)


def _backward(chosen: Iterable[Case], device: str) -> list[Job]:
    """On each case the backward passes of the yardsticks, of ours (a tail too), and of peers with masks."""
    ours = (kernel(device), *OTHERS_BACKWARD[device], f"{kernel(device)}-tail")
    return [
        Job(
            "backward", f"{case.title}: {name} backward", {"case": [case.name, case.preset], "provider": name}
        )
        for case in chosen
        for name in (*YARDSTICKS[device], *ours, *BACKWARD_PEERS[device])
        if _of_use(name, case)
    ]


def _attention(case: Case, provider: str) -> Job:
    arguments = {"case": [case.name, case.preset], "provider": provider}
    return Job("attention", f"{case.title}: {provider}", arguments)


def missing(device: str) -> list[tuple[Job, str]]:
    """The peers that are not installed, and why that is so."""
    return [
        (Job("attention", name), reason)
        for name in PEERS[device]
        if (reason := PROVIDERS[name].missing()) is not None
    ]


def tuning_cases(device: str) -> dict[int, tuple[Case, ...]]:
    """By head_dim, the cases on which launches are chosen."""
    return cases.REHEARSAL["tuning"] if device == "cpu" else cases.TUNING


def grid(case: Case, chosen: Iterable[Launch]) -> list[Job]:
    """The launches on one case."""
    key = [case.name, case.preset]
    return [
        Job(
            "launch" if launch.part == "forward" else "backward launch",
            f"{case.title}: {launches.describe(launch)}",
            {"case": key, "launch": list(launch)},
        )
        for launch in chosen
    ]


def profiled(device: str) -> tuple[Job, Job]:
    """What NVIDIA's tools look at: a real case for the counters, a small one for memory and races."""
    case = (cases.REHEARSAL["shapes"] if device == "cpu" else cases.SHAPES)[0]
    return _attention(case, kernel(device)), _check("bf16", [64])


def describe() -> str:
    """The schedule for a GPU in words."""
    phases, lines = of("cuda"), []
    for name, jobs in (
        ("check against float64", phases.checks),
        ("time full blocks", phases.rate),
        ("time real shapes", phases.shapes),
        ("time backward passes", phases.backward),
        ("time one step of whole transformers, dense and under each recipe", phases.steps),
    ):
        lines += [f"{name}:", *(f"  {job.name}" for job in jobs)]
    for head_dim, chosen in cases.TUNING.items():
        names = " and ".join(case.title for case in chosen)
        lines.append(f"time {len(launches.GRID)} launches with head_dim {head_dim} on {names}")
        lines.append(f"time {len(launches.BACKWARD_GRID)} of the backward pass on the same")
    lines += [f"left out, {reason}" for _, reason in missing("cuda")]
    return "\n".join(lines)
