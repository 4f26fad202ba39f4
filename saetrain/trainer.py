"""The loop and the step, nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from actcache.atomic import FileReceipt
from actcache.errors import ActcacheError
from actcache.order import OrderPlan
from actcache.stream import ActivationStream, Batch
from saetrain.best import Best, keep_only, save_best
from saetrain.checkpoint import NEWEST, Keep, best_steps, newest_step, save_part
from saetrain.crew import Crew
from saetrain.decoder_norm import fold
from saetrain.follow import Follower
from saetrain.formats.sparsify import save_sae
from saetrain.gradient import add_gradient, clip_gradient, gradient_norm
from saetrain.inputs import rows_of
from saetrain.metrics import Firing, Meter, decoder_norms
from saetrain.non_finite import Guard, NonFiniteError, require_finite, with_rows
from saetrain.objective import PLAIN, Objective
from saetrain.optim import Optimizer, step_if
from saetrain.peers import PeerGoneError
from saetrain.recipe import Recipe
from saetrain.run import RunRecord, SaeEntry
from saetrain.sae import Sae
from saetrain.scaling import Scaling, scaling_of
from saetrain.shared_batches import SharedBatches
from saetrain.stopping import StopAsked, Stopped
from saetrain.tracking import Tracker
from saetrain.validation import Validation
from saetrain.vitals import Vitals, decoder_norm_range
from saetrain.waiting import Waiting

V = TypeVar("V")


@dataclass
class Trainee:
    """One SAE in training, with all that belongs to it alone."""

    entry: SaeEntry
    sae: Sae
    optimizer: Optimizer
    firing: Firing
    meter: Meter
    variance: float
    """Mean of ‖y - mean‖² over the training rows of what is predicted."""
    objective: Objective = PLAIN
    """What it is trained on besides FVU and AuxK."""
    recipe: Recipe = field(default_factory=Recipe)
    """How its steps are made."""
    guard: Guard = field(init=False)
    """Whether its losses have been finite."""
    scaling: Scaling | None = field(init=False)
    """How its rows are scaled."""
    vitals: Vitals = field(init=False)
    """How often its latents fire, and how long its gradients are."""
    best: Best | None = None
    """With --save-best, the best that it has been."""
    saved_bests: frozenset[int] = frozenset()
    """Steps of the best ones that checkpoints name: they must stay as long as those do."""
    number: int = 0
    """Its place among the SAEs of the run."""
    shared: SharedBatches | None = None
    """With --parallel ddp, the other processes' part of each step."""

    def __post_init__(self) -> None:
        """Watch the losses where they are computed."""
        self.guard = Guard(self.sae.W_enc.device)
        self.vitals = Vitals(self.sae.num_latents, self.sae.W_enc.device)
        self.scaling = scaling_of(self.entry, self.sae.W_enc.device, self.sae.W_enc.dtype)

    def exported(self) -> dict[str, Tensor]:
        """The weights as they are saved and judged, and thresholds that are no weights."""
        weights = dict(self.sae.named_buffers()) | self.optimizer.weights_to_export()
        weights = fold(weights) if self.recipe.decoder_norm == "fold" else weights
        return weights if self.scaling is None else self.scaling.raw(weights)

    def unit_norm(self) -> bool:
        """Whether the saved decoder rows are meant to have norm 1."""
        of_columns = self.scaling is not None and self.scaling.by is None
        return self.recipe.decoder_norm != "free" and not of_columns

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Tensors and numbers for a checkpoint."""
        tensors = {f"sae.{name}": p for name, p in self.sae.state_dict().items()}
        tensors |= {f"optimizer.{name}": t for name, t in self.optimizer.state_tensors().items()}
        tensors |= {"firing": self.firing.rows_since, "meter": self.meter.sums}
        for name, p in self.sae.named_parameters():
            if p.grad is not None:  # some batches of an update that is not made yet
                tensors[f"gradient.{name}"] = p.grad
        numbers = {f"optimizer.{k}": v for k, v in self.optimizer.state_numbers().items()}
        watched, counted = self.vitals.state()
        tensors |= {f"vitals.{name}": tensor for name, tensor in watched.items()}
        numbers |= {f"vitals.{name}": number for name, number in counted.items()}
        return tensors, numbers | {"meter.steps": self.meter.steps}

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Put back what `state` gave."""
        self.sae.load_state_dict(_below("sae.", tensors))
        self.optimizer.load_state(_below("optimizer.", tensors), _below("optimizer.", numbers))
        for name, gradient in _below("gradient.", tensors).items():
            parameter = self.sae.get_parameter(name)
            parameter.grad = gradient.to(parameter.device)
        self.firing.rows_since.copy_(tensors["firing"])
        self.meter.sums.copy_(tensors["meter"])
        self.meter.steps = int(numbers["meter.steps"])
        self.vitals.load_state(_below("vitals.", tensors), _below("vitals.", numbers))


def train(
    root: Path,
    record: RunRecord,
    trainees: list[Trainee],
    stream: ActivationStream,
    tracker: Tracker,
    first_step: int,
    follower: Follower | None = None,
    validation: Validation | None = None,
    crew: Crew | None = None,
) -> int:
    """Train until the run's last step, or the last of its data, from `first_step` on.

    Args:
        root: folder of the run.
        record: what the run is.
        trainees: what is trained.
        stream: at the batch of `first_step`.
        tracker: hears of every step that is logged.
        first_step: steps done.
        follower: pins what is used of a cache that is still being harvested.
        validation: held-out rows, if the run validates.
        crew: the processes of the run; None: this one alone, whom nobody asks to stop.

    Returns:
        Steps done in the whole run.

    Raises:
        Stopped: a signal asked for it, and the steps before it are saved.
        NonFiniteError: a loss is not finite; it has reached no weight, and a checkpoint before it
            stays.
        CorruptShardError: a shard has changed or is gone; the steps before it are saved. So they
            are for any other error of the reader.
    """
    try:
        return _train(
            root,
            record,
            trainees,
            stream,
            tracker,
            first_step,
            follower,
            validation,
            crew or Crew(),
        )
    except NonFiniteError as error:
        read = {entry.name: entry.hookpoints for entry in record.saes}[error.hookpoint]
        raise with_rows(
            error, root, stream.cache, read, lambda step: _place(record, follower, step)
        ) from error


def _train(
    root: Path,
    record: RunRecord,
    trainees: list[Trainee],
    stream: ActivationStream,
    tracker: Tracker,
    first_step: int,
    follower: Follower | None,
    validation: Validation | None,
    crew: Crew,
) -> int:
    options, done, saved = record.options, first_step, first_step
    keep = Keep(options.keep_last, options.keep_every)
    groups = by_hookpoint(trainees)
    if follower is not None:
        waiting = Waiting(stream.cache, follower.plans.segmentation.shards_each, tracker.bar)

        def wait(shard: int) -> None:
            nonlocal saved
            waiting(shard)
            crew.keep_pace(done)
            if done > saved and crew.can_keep:  # time enough, and who stops it now loses nothing
                tracker.sync()
                save(root, done, trainees, place, crew, keep)
                saved = done
            crew.look(done, waits=True)

        stream.on_wait = wait
    place = stream.state_dict()
    try:
        for step in range(first_step, record.steps):
            crew.keep_pace(step)
            crew.look(done)
            try:
                batch = crew.next_batch(stream)
            except PeerGoneError:
                raise
            except Exception:
                _keep(root, done, saved, trainees, place, tracker, crew, keep)
                raise
            if batch is None:
                break
            # Not while the first rows are read: there is nothing to save yet.
            crew.stopping.listen()
            if follower is not None:
                follower.use(batch)
            train_batch(groups, batch, step)
            done, place = step + 1, stream.state_dict()
            last = done == record.steps or batch.last
            if done % options.log_every == 0 or last:
                rows = done * record.plan.batch_size
                metrics = _read_metrics(root, trainees, done, rows)
                if options.has_histogram(done, last=last):
                    for trainee in trainees:
                        metrics[trainee.entry.name] |= trainee.vitals.read_density()
                tracker.log(done, metrics, stream.seconds_waited)
            if validation is not None and (done % (options.val_every or 1) == 0 or last):
                figures = validate(root, groups, validation, done, options.save_best)
                tracker.log_held_out(done, figures, validation.rows)
            if done % options.save_every == 0 or keep.is_due(done) or last:
                tracker.sync()
                save(root, done, trainees, place, crew, keep)
                saved = done
            if last:
                break
    except StopAsked as stop:
        if done > saved:
            tracker.sync()
            save(root, done, trainees, place, crew, keep)
        raise Stopped(stop.signal, done) from None
    return done


def by_hookpoint(trainees: list[Trainee]) -> dict[str, list[Trainee]]:
    """Those that are fed with the same rows, together."""
    groups: dict[str, list[Trainee]] = {}
    for trainee in trainees:
        groups.setdefault(trainee.entry.hookpoint, []).append(trainee)
    return groups


def train_batch(groups: dict[str, list[Trainee]], batch: Batch, step: int) -> None:
    """One update of every SAE. Rows go to the device once for each hookpoint."""
    for group in groups.values():
        rows = rows_of(group[0].entry, batch.activations)
        weights = group[0].sae.W_enc
        # In their own type, which is smaller; there into that of the weights.
        x = rows.to(weights.device, non_blocking=True).to(weights.dtype)
        for trainee in group:
            train_step(trainee, x, step, trainee.entry.options.auxk_alpha)


def _keep(
    root: Path,
    done: int,
    saved: int,
    trainees: list[Trainee],
    place: dict[str, int],
    tracker: Tracker,
    crew: Crew,
    keep: Keep,
) -> None:
    """Save what was learnt before rows could not be read, and say what is saved."""
    if done > saved and crew.can_keep:
        tracker.sync()
        try:
            save(root, done, trainees, place, crew, keep)
        except ActcacheError as error:  # what happened to the rows is the news, not this
            tracker.bar.say(f"warning: step {done:,} could not be saved: {error}")
        else:
            saved = done
    if saved:
        tracker.bar.say(
            f"rows could not be read; step {saved:,} is saved, and --resume goes on from there"
        )
    if crew.can_keep:
        crew.wait()  # whoever ends first takes the others with it


def train_step(trainee: Trainee, rows: Tensor, step: int, auxk_alpha: float) -> None:
    """One batch for one SAE, its rows in any type, on any device; and an update, if it is due.

    Nothing here makes the host wait for the device, but AuxK, which counts the dead latents, and
    BatchTopK, which asks whether it has looked far enough.
    """
    sae, recipe, shared = trainee.sae, trainee.recipe, trainee.shared
    if (k := recipe.k(step)) is not None:
        sae.k = k
    if recipe.begins_update(step):
        # Before the step, not after: what signum exports is an average drawn from the weights that
        # the step leaves, and normalising those last costs it 1% of FVU.
        if recipe.decoder_norm == "unit":
            sae.normalise_decoder()
        sae.activation.project()
    x = rows.to(device=sae.W_enc.device, dtype=sae.W_enc.dtype, non_blocking=True)
    if trainee.scaling is not None:
        x = x * trainee.scaling.rows
    dead = trainee.firing.dead() if auxk_alpha > 0 else None
    losses = add_gradient(
        sae, x, trainee.variance, dead, trainee.objective, step, auxk_alpha, recipe, shared
    )
    loss = losses.total(auxk_alpha)
    finite = trainee.guard.check(loss if shared is None else shared.mean(loss), step)
    if recipe.ends_update(step):
        _update(trainee, step, finite)
    if shared is not None:
        shared.count(losses, trainee.firing, trainee.vitals, trainee.meter)
        return
    sae.activation.observe(losses.output.top_acts, anew=recipe.changes_k(step))
    trainee.firing.add((losses.output.top_acts, losses.output.top_indices))
    trainee.vitals.add_latents(losses.output.top_acts, losses.output.top_indices)
    trainee.meter.add(losses)


def _update(trainee: Trainee, step: int, finite: Tensor) -> None:
    """Change the weights by their gradient, unless `finite` says that it must not reach them."""
    sae, recipe = trainee.sae, trainee.recipe
    if recipe.decoder_norm == "unit":
        sae.remove_parallel_gradient()
    if recipe.grad_clip is not None:
        norm = clip_gradient(sae.parameters(), recipe.grad_clip)
        finite = trainee.guard.check(norm, step)
    else:
        norm = gradient_norm(p.grad for p in sae.parameters() if p.grad is not None)
    trainee.vitals.add_gradient(norm)
    step_if(finite, trainee.optimizer, recipe.first_step_of_update(step))


def validate(
    root: Path,
    groups: dict[str, list[Trainee]],
    validation: Validation,
    done: int,
    keep_best: bool,
) -> dict[str, dict[str, float]]:
    """Measure every SAE as it would be exported, and write those that were never better.

    Returns:
        Figures by the SAE's name.
    """
    figures = {}
    for group in groups.values():
        rows = validation.on(group[0].entry, group[0].sae.W_enc.device)
        for trainee in group:
            weights, entry = trainee.exported(), trainee.entry
            if trainee.recipe.k_anneal_steps:
                trainee.sae.k = entry.config.k  # while k falls, every step sets its own
            found = validation.measure(trainee.sae, weights, entry, rows)
            _require_finite(root, trainee, found["fvu"], done)
            figures[entry.name] = found
            if keep_best and (trainee.best is None or found["fvu"] < trainee.best.fvu):
                folder, unit = root / entry.name, trainee.unit_norm()
                trainee.best = save_best(folder, entry, weights, unit, done, found["fvu"])
                keep_only(folder, {done, *trainee.saved_bests})
    return figures


def save(
    root: Path,
    done: int,
    trainees: list[Trainee],
    place: dict[str, int],
    crew: Crew,
    keep: Keep = NEWEST,
) -> None:
    """Write every SAE as others load it, and a checkpoint.

    The checkpoint comes last: killed before it, the run does these steps again and writes the same
    SAEs; killed after it, nothing is missing.
    """
    if not crew.saves:
        return
    for trainee in trainees:
        _require_finite_state(root, trainee, done)
    exports = [export(root, trainee) for trainee in trainees]
    parts = {
        trainee.number: save_part(root, done, trainee.number, trainee.state(), file, trainee.best)
        for trainee, file in zip(trainees, exports, strict=True)
    }
    crew.commit(root, done, place, parts, keep)
    forget_other_bests(root, trainees)


def export(root: Path, trainee: Trainee) -> FileReceipt:
    """Write an SAE as others load it."""
    weights, unit = trainee.exported(), trainee.unit_norm()
    entry = trainee.entry
    return save_sae(root / entry.name, entry.config, weights, entry.reads, unit)


def forget_other_bests(root: Path, trainees: list[Trainee]) -> None:
    """Remove best ones that no checkpoint names: of before, or newer than what is gone on from."""
    for trainee in trainees:
        saved = set() if trainee.best is None else best_steps(root, trainee.number)
        trainee.saved_bests = frozenset(saved)
        keep_only(root / trainee.entry.name, saved)


def _read_metrics(
    root: Path, trainees: list[Trainee], step: int, rows: int
) -> dict[str, dict[str, Any]]:
    metrics = {}
    for trainee in trainees:
        means = trainee.meter.read()
        _require_finite(root, trainee, means["fvu"] + means["auxk"], step)
        dead: dict[str, Any] = {
            "dead_percent": trainee.firing.dead_percent(rows),
            "dead_after": trainee.firing.dead_after,
        }
        update = trainee.recipe.first_step_of_update(step - 1)
        # No k: a penalty decides.
        now = {"lr": trainee.optimizer.learning_rate(update), "k": trainee.sae.k or None}
        norms = decoder_norm_range(trainee.sae.W_dec) | _norms(trainee)
        metrics[trainee.entry.name] = means | dead | now | norms | trainee.vitals.read()
    return metrics


def _norms(trainee: Trainee) -> dict[str, float]:
    """Of a crosscoder, the norms of its decoder's rows as they are saved, at each hookpoint."""
    parts = trainee.objective.parts
    if not parts:
        return {}
    weights: dict[str, Tensor] = dict(trainee.sae.named_parameters())
    if trainee.recipe.decoder_norm == "fold":
        weights = fold(weights)
    if trainee.scaling is not None:
        weights = trainee.scaling.raw(weights)
    return decoder_norms(weights["W_dec"], parts)


def _require_finite_state(root: Path, trainee: Trainee, step: int) -> None:
    """Refuse to save what a loss that was not finite has touched.

    The weights alone do not tell: the sign of NaN is 0, so signum keeps them finite.
    """
    _require_finite(root, trainee, float(trainee.meter.sums.sum()), step)
    for parameter in trainee.sae.parameters():
        if not bool(parameter.isfinite().all()):
            _require_finite(root, trainee, float("nan"), step)


def _require_finite(root: Path, trainee: Trainee, value: float, step: int) -> None:
    first_bad = trainee.guard.first_bad()
    require_finite(value, trainee.entry.name, step, first_bad, newest_step(root))


def _place(record: RunRecord, follower: Follower | None, step: int) -> tuple[OrderPlan, int, int]:
    """Plan of step `step` (from 0) of a run, its epoch, and the step within both."""
    if follower is None:
        return record.plan, *divmod(step, record.plan.steps_per_epoch)
    return follower.plan_of(step)


def _below(prefix: str, items: dict[str, V]) -> dict[str, V]:
    return {k.removeprefix(prefix): v for k, v in items.items() if k.startswith(prefix)}
