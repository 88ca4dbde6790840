"""HeadHunter: the attention heads whose perturbation guides best, found by a greedy search."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.json_files import check_same, read_json, write_json
from dit_accel.layer_names import flat_indices
from dit_accel.pipelines.families import family_of
from dit_accel.seeds import check_seed

from .objectives import Objective, name_of
from .perturbation import Head, HeadPerturbation
from .trials import Pair, Trials

if TYPE_CHECKING:
    from accelerate import PartialState

SCHEMA = "dit-accel/hunt/1"
LOG, FOUND, SAMPLES = "log.json", "heads.json", "samples"


@dataclass(frozen=True)
class Round:
    """One round of a search.

    Attributes:
        means: the mean of every objective with all heads chosen before and this one perturbed, by head.
        chosen: what the round added, best first.
        score: the mean of the objective with all heads chosen so far.
    """

    means: Mapping[Head, Mapping[str, float]]
    chosen: tuple[Head, ...]
    score: float


@dataclass(frozen=True)
class Hunt:
    """What a search found.

    Attributes:
        objective: its name.
        layers: names of the model's layers by flat index.
        heads_per_layer: their number of heads.
        options: of the perturbation, all but its heads.
        without: the mean of the objective without guidance.
        rounds: what each round measured; one that chose none, as no head reached the floors, is the last.
    """

    objective: str
    layers: tuple[str, ...]
    heads_per_layer: int
    options: Mapping[str, Any]
    without: float
    rounds: tuple[Round, ...] = ()

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads in the order in which they were chosen."""
        return tuple(head for one in self.rounds for head in one.chosen)

    @property
    def best(self) -> tuple[Head, ...]:
        """The heads of the rounds up to the one with the highest score, of equal ones the first.

        A search may add more heads than are good for it: published sets have fewer than it tries.
        """
        after = [one for one in self.rounds if one.chosen]
        scores = [one.score for one in after]
        stop = scores.index(max(scores)) + 1 if scores else 0
        return tuple(head for one in after[:stop] for head in one.chosen)

    @property
    def perturbation(self) -> HeadPerturbation | None:
        """Guidance by the best heads; None where no head reached the floors."""
        return HeadPerturbation(self.best, **self.options) if self.best else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        rounds = [
            {
                "chosen": [list(head) for head in one.chosen],
                "score": one.score,
                "means": [[*head, dict(row)] for head, row in one.means.items()],
            }
            for one in self.rounds
        ]
        return {
            "objective": self.objective,
            "layers": list(self.layers),
            "heads_per_layer": self.heads_per_layer,
            "without": self.without,
            "heads": [list(head) for head in self.heads],
            "best": [list(head) for head in self.best],
            "rounds": rounds,
        }


class HeadHunter:
    """Greedy search for the (layer, head) pairs whose perturbation guides a pipeline best.

    Each round generates the same prompt-seed pairs with all heads chosen so far and one more perturbed, for
    every head that is left, and adds the `top_k` whose mean score is highest; ties go to the lower layer,
    then the lower head. The defaults are those published for styles; for general quality they are 1 round,
    the top 24, 20 pairs and `perturbation={"strength": 0.25}`. Searched at strength 1, a set often works best
    at a lower one.

    Under `accelerate launch` the processes share the work, and `folder` must be on a disk they all see. The
    folder then holds `log.json`, the found set (`Hunt.best`) as `heads.json`, which `Recipe` files name as
    `guidance`, and every image and its scores. A search that was stopped goes on there, and ends as it would
    have.

    Args:
        pipe: a diffusers pipeline. What is enabled on it stays in force.
        objective: a callable, see `dit_accel.guidance.objectives`.
        pairs: (prompt, seed).
        folder: for log, images and scores.
        rounds, top_k: rounds, and heads that each adds.
        perturbation: options of `HeadPerturbation`, all but `heads`; `scale` is 8 for FLUX, else 3.
        floors: (objective, minimum): a head whose mean is below is not added, so a round may add fewer.
        heads: what is searched; None for all.
        call, generate, batch: see `Trials`.

    Raises:
        ValueError, TypeError: a value outside these forms.

    Source: HeadHunter (arXiv 2506.10978).
    """

    def __init__(
        self,
        pipe: Any,
        objective: Objective,
        pairs: Iterable[tuple[str, int]],
        folder: str | Path,
        *,
        rounds: int = 5,
        top_k: int = 3,
        perturbation: Mapping[str, Any] | None = None,
        floors: Sequence[tuple[Objective, float]] = (),
        heads: Iterable[Head] | None = None,
        **trials: Any,
    ):
        for name, value in (("rounds", rounds), ("top_k", top_k)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.pairs = [Pair(*pair) for pair in pairs]
        if not self.pairs or len(set(self.pairs)) < len(self.pairs):
            raise ValueError(f"`pairs` must be different (prompt, seed) pairs, got {self.pairs!r}")
        for pair in self.pairs:
            check_seed(pair.seed)
        self.objective, self.rounds, self.top_k, self.folder = name_of(objective), rounds, top_k, Path(folder)
        self.floors = [(name_of(one), float(minimum)) for one, minimum in floors]
        for name, minimum in self.floors:
            if not math.isfinite(minimum):
                raise ValueError(f"the minimum of {name} in `floors` must be a finite number, got {minimum}")
        family = family_of(pipe.transformer)
        self._names = list(family.layers(pipe.transformer))
        self._count = family.heads(pipe.transformer)[0]
        self.options = {"scale": family.head_search.scale, **(perturbation or {})}
        self.heads = self._searched(heads)
        self.perturbation(self.heads[:1])  # refuses bad options before anything runs
        objectives = [objective, *(one for one, _ in floors)]
        self.trials = Trials(pipe, objectives, self.folder / SAMPLES, **trials)

    def perturbation(self, heads: Sequence[Head]) -> HeadPerturbation | None:
        """Guidance by these heads; None for none."""
        return HeadPerturbation(heads, **self.options) if heads else None

    def run(self, resume: bool = False, progress: bool = False) -> Hunt:
        """Search.

        Args:
            resume: whether to go on with a search that the folder holds. One with other settings is refused;
                only `rounds` may differ.
            progress: whether to show a progress bar on stderr.

        Raises:
            ValueError: the folder holds a search that is not to be resumed, or one with other settings; or
                see `Trials.score`.
        """
        settings = self._check_log(resume)
        self._processes.wait_for_everyone()  # until all have looked
        (without,) = self._means([()], "without guidance", progress)
        layers = tuple(name for name in self._names if not name.endswith(".attn2"))
        hunt = Hunt(self.objective, layers, self._count, self.options, without[self.objective])
        self._write(settings, hunt)
        for number in range(1, self.rounds + 1):
            left = [head for head in self.heads if head not in hunt.heads]
            if not left:
                break
            sets = [(*hunt.heads, head) for head in left]
            found = self._means(sets, f"round {number} of {self.rounds}", progress)
            means = dict(zip(left, found, strict=True))
            chosen = self._best(means)
            (after,) = self._means([(*hunt.heads, *chosen)], "the chosen heads", progress)
            hunt = replace(hunt, rounds=(*hunt.rounds, Round(means, chosen, after[self.objective])))
            self._write(settings, hunt)
            if not chosen:
                break
        return hunt

    @property
    def _processes(self) -> PartialState:
        """This process among those that `accelerate launch` started; accelerate keeps one state of them."""
        from accelerate import PartialState

        return PartialState(cpu=self.trials.pipe._execution_device.type == "cpu")

    # -- searching -----------------------------------------------------------------------------------------

    def _searched(self, heads: Iterable[Head] | None) -> list[Head]:
        """The heads of the search, in order, after a check that the perturbation can be of each alone."""
        if self.options.get("kind") == "pag":
            raise ValueError("kind='pag' is of whole layers, and heads are searched; use kind='soft_pag'")
        parts = zip(self._names, flat_indices(self._names), strict=True)
        dual = self.options.get("modules") == "attn2"
        layers = {layer for name, layer in parts if name.endswith(".attn2") or not dual}
        every = {(layer, head) for layer in layers for head in range(self._count)}
        chosen = sorted(every if heads is None else {(layer, head) for layer, head in heads})
        for head in chosen or [None]:
            if head not in every:
                raise ValueError(f"`heads` must be (layer, head) pairs of this model, got {head}")
        HeadPerturbation(chosen, **self.options).to_dict()  # whose options may not be plain
        return chosen

    def _means(
        self, head_sets: Sequence[Sequence[Head]], label: str, progress: bool
    ) -> list[dict[str, float]]:
        """The mean of every objective over all pairs, of each set of heads.

        Processes take turns with batches; what a batch holds does not depend on their number.
        """
        from accelerate.utils import gather_object
        from tqdm import tqdm

        state, batches = self._processes, self.trials.batches(self.pairs)
        work = [(place, batch) for place in range(len(head_sets)) for batch in batches]
        mine = work[state.process_index :: state.num_processes]
        shown = progress and state.is_main_process
        done = [
            (place, self.trials.score(self.perturbation(head_sets[place]), batch))
            for place, batch in tqdm(mine, label, disable=not shown)
        ]
        scores: list[list[dict[str, float]]] = [[] for _ in head_sets]
        for place, rows in gather_object(done):
            scores[place] += rows
        names = self.trials.objectives  # a sum of floats that is exact does not depend on their order
        return [{name: math.fsum(row[name] for row in rows) / len(rows) for name in names} for rows in scores]

    def _best(self, means: Mapping[Head, Mapping[str, float]]) -> tuple[Head, ...]:
        """The heads that a round adds, best first."""
        fit = [head for head, row in means.items() if all(row[name] >= least for name, least in self.floors)]
        return tuple(sorted(fit, key=lambda head: (-means[head][self.objective], head))[: self.top_k])

    # -- files ---------------------------------------------------------------------------------------------

    def _check_log(self, resume: bool) -> dict[str, Any]:
        """The settings of this search, after a check against a search that the folder holds."""
        settings = {
            **self.trials.made_by,
            "perturbation": self.options,
            "objective": self.objective,
            "floors": self.floors,
            "top_k": self.top_k,
            "searched": self.heads,
            "pairs": self.pairs,
        }
        log = self.folder / LOG
        if not log.exists():
            return settings
        if not resume:
            raise ValueError(f"{log} is of an earlier search; resume it, or use another folder")
        earlier = read_json(log, "the log of a search")
        if not isinstance(earlier, dict) or not isinstance(earlier.get("settings"), dict):
            raise ValueError(f"{log} is not the log of a search; use another folder")
        check_same(earlier["settings"], settings, f"{log} is of a search", "another folder")
        return settings

    def _write(self, settings: dict[str, Any], hunt: Hunt) -> None:
        if not self._processes.is_main_process:
            return
        log = {"schema": SCHEMA, "settings": settings, **hunt.to_dict()}
        write_json(self.folder / LOG, log)
        if hunt.perturbation is not None:
            write_json(self.folder / FOUND, hunt.perturbation.to_dict())
