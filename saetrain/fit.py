"""From options to a finished run: decide, check, build, train."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache.atomic import digest_file, remove_partials
from actcache.budget import PREFETCH_BATCHES, Budget, spare_windows, spend
from actcache.device import choose_device
from actcache.errors import ConfigError, DiskFullError, FormatError, RunError
from actcache.lock import FolderLock
from actcache.manifest import MANIFEST
from actcache.order import OrderPlan, make_plan, split_shards
from actcache.progress import format_bytes
from actcache.reader import Cache
from actcache.segments import Segmentation, default_shards_each, goal_rows
from actcache.stream import ActivationStream
from actcache.tuning import Tuning, tune
from saetrain.best import Best, best_folder
from saetrain.checkpoint import (
    Keep,
    State,
    load_checkpoint,
    load_parts,
    newest_state,
    newest_step,
    remove_others,
)
from saetrain.config import PENALISED, FitConfig, SaeConfig, SaeOptions
from saetrain.crew import Crew, Decided, assemble, tells
from saetrain.ending import forget, tell, told
from saetrain.finetune import Origins, begin_with
from saetrain.follow import Follower
from saetrain.forcing import force, with_change
from saetrain.formats.sparsify import WEIGHTS
from saetrain.gradient import require_bfloat16_products
from saetrain.grid import require_overrides_used, saes_at
from saetrain.initial import FirstRows, initial_sae, start_at_median, with_scales
from saetrain.inputs import Wiring, hookpoints_of, targets_of, wire
from saetrain.limits import Waits, sentence
from saetrain.metrics import Firing, Meter
from saetrain.objective import objective_of
from saetrain.optim import default_lr, make_optimizer, make_schedule
from saetrain.recipe import make_recipe
from saetrain.run import (
    FORMAT_VERSION,
    RUN,
    RunRecord,
    SaeEntry,
    changed_options,
    check_same_cache,
    check_same_run,
    place_of,
    read_run,
    receipts_digest,
    write_run,
)
from saetrain.shared_batches import SharedBatches
from saetrain.stopping import Stopping
from saetrain.tracking import METRICS, Tracker, last_line, saes_of
from saetrain.trainer import Trainee, export, forget_other_bests, train
from saetrain.validation import Validation
from saetrain.waiting import first_segment, require_batch
from saetrain.wandb_runs import new_id, open_wandb

LOCK = Path("fit.lock")
Kinds = Callable[[Sequence[SaeEntry]], list[SaeConfig]]
_DEAD_AFTER = 10_000_000


@dataclass(frozen=True)
class FitSummary:
    """What a call of `fit` did."""

    run: str
    steps: int
    """Of the whole run."""
    new_steps: int
    """Done by this call."""
    rows: int
    """Trained on in the whole run."""
    rows_per_second: float
    """In this call, for all SAEs together; 0 when nothing was left to do."""
    bytes_per_second: float
    """Of rows on disk, likewise."""
    data_wait: float
    """Share of the time spent waiting for rows."""
    limit: str | None
    """One sentence: what the limit was, and what would help; None when nothing was left to do."""
    dead_after: int
    """Rows without firing after which a latent is dead."""
    saes: dict[str, dict[str, Any]]
    """Last line of metrics.jsonl, by the SAE's name."""
    held_out: dict[str, dict[str, Any]]
    """Last validation, by the SAE's name; none without --val-every."""
    best: dict[str, Best]
    """With --save-best, each SAE's best validation, by name."""
    warnings: tuple[str, ...]
    """What the user should know."""


def fit(config: FitConfig) -> FitSummary:
    """Train the SAEs of each hookpoint chosen from one pass over its rows, or go on with a run.

    SIGTERM and Ctrl-C let it save at the next step; a second one ends it at once.

    Raises:
        ActcacheError: one of its kinds, for anything a user can mend.
        Stopped: a signal asked for it, and the steps before it are saved.
    """
    root = Path(config.out)
    lock = FolderLock(root, LOCK, "fit")

    def is_ours(error: BaseException | None) -> bool:
        return lock.held and tells(error)

    def last_words(error: BaseException) -> None:
        if is_ours(error):
            tell(root, error)

    try:
        with (
            Stopping() as stopping,
            told(root, is_ours),
            assemble(config, stopping, last_words) as crew,
        ):
            return _fit(config, root, lock, crew)
    except DiskFullError as error:
        remedy = "free space; the same command with --resume goes on from what is saved"
        raise DiskFullError(
            error.what, expected=error.expected, got=error.got, remedy=remedy
        ) from error
    finally:
        lock.release()


def _fit(config: FitConfig, root: Path, lock: FolderLock, crew: Crew) -> FitSummary:
    changes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    if crew.leads:
        cache, device = _open(config), _device(config)
        begun = _is_begun(config, root)
        if begun:
            lock.take()
            forget(root)
            remove_partials(root)
            record, changes, warnings = _go_on(config, cache, root, crew)
        else:
            record = _decide(config, cache, device, crew)
            warnings = () if config.follow else _missing_shards(cache)
        crew.require(record)
        crew.tell(Decided(begun, record))
    else:
        decided = crew.hear(Decided)
        begun, record = decided.begun, decided.record
        if begun:
            _join(lock, root)
        cache, device = _open(config), _device(config)
        check_same_cache(record, cache)
    if record.extensions is not None:  # those that came later are no part of the run
        cache = cache.before(record.extensions)
    crew.begin(device)
    numbers = crew.saes(record.saes)
    trainees = _build(record, cache, device, numbers, crew.shares_batches)
    follower = None if record.segment_shards is None else Follower(root, record, cache, crew.leads)
    restored = _restore(root, record, trainees, follower, crew) if begun else _Restored()
    first_step = restored.step
    if first_step == 0:
        first = FirstRows(cache, record.plan)
        for trainee in trainees:
            start_at_median(trainee.sae, trainee.entry, first)
            if record.origins:
                origin = record.origins[trainee.number]
                begin_with(trainee.sae, trainee.entry, origin, record.options)
    validates = crew.saves and first_step < record.steps
    validation = _held_out_rows(record, cache, trainees) if validates else None
    crew.wait()
    if crew.leads and begun:
        _write_changes(root, record, first_step, changes)
    elif crew.leads:  # only now: a run that cannot be built leaves nothing behind
        lock.take()
        if (root / RUN).exists():
            raise RunError(f"another fit has begun a run in {root}", remedy="--resume, or wait")
        remove_partials(root)
        write_run(root, record)
    crew.wait()
    _join(lock, root)
    hookpoints = hookpoints_of([trainee.entry for trainee in trainees])
    tuning = tune(cache, hookpoints, record.plan)
    budget = budget_of(config, cache, hookpoints)
    stream = ActivationStream(
        cache,
        hookpoints,
        record.plan if follower is None else follower.plans,
        epochs=None if follower is None else _epochs(record),
        verify=config.verify,
        rank=crew.rank if crew.shares_batches else 0,
        world_size=crew.processes if crew.shares_batches else 1,
        prefetch=budget.prefetch,
        reading=tuning.reading,
        device=device if device.type == "cuda" else None,
    )
    if restored.stream:
        stream.load_state_dict(restored.stream)
    crew.set_pace(first_step, record.plan.batch_size, _row_bytes(record, cache))
    tracker = crew.tracker(
        lambda: Tracker(root, first_step, record.steps, record.plan.batch_size, stream.row_bytes),
        record.saes,
    )
    for warning in restored.warnings:
        tracker.bar.say(f"warning: {warning}")
    if first_step == 0:
        for sae, source in zip(record.saes, record.origins, strict=False):
            sizes = f"{sae.config.num_latents:,} latents, k {sae.config.k}"
            tracker.bar.say(f"fit: {sae.name} begins with {source.path} ({sizes})")
    if first_step < record.steps:
        tracker.bar.say(_how_it_reads(record, tuning, stream.row_bytes))
    try:
        if crew.leads:
            tracker.mirror = open_wandb(root, record, tracker.bar.say)
        steps = train(
            root, record, trainees, stream, tracker, first_step, follower, validation, crew
        )
        tracker.end()
    finally:
        stream.close()
        seconds = tracker.seconds
        rows_per_second, data_wait = tracker.close()
    crew.wait()  # for the last line
    line = last_line(root / METRICS, key="saes")
    if line is None:  # a finished run that lost it; one that trained just wrote it
        raise FormatError(f"{root / METRICS} is missing or empty", remedy="restore it from a copy")
    return FitSummary(
        run=str(root),
        steps=steps,
        new_steps=steps - first_step,
        rows=steps * record.plan.batch_size,
        rows_per_second=rows_per_second,
        bytes_per_second=rows_per_second * stream.row_bytes,
        data_wait=data_wait,
        limit=_limit(stream, seconds, rows_per_second, config) if steps > first_step else None,
        dead_after=record.dead_after,
        saes=saes_of(root / METRICS, line, [entry.name for entry in record.saes]),
        held_out=(last_line(root / METRICS, key="val") or {"val": {}})["val"],
        best=_bests(root, record),
        warnings=(*warnings, *restored.warnings, *_ended_early(record, steps)),
    )


def _join(lock: FolderLock, root: Path) -> None:
    """Hold the lock that the leader has taken; raises `RunError` if it is not to be seen here."""
    try:
        lock.join()
    except FileNotFoundError as error:
        raise RunError(
            f"the run that rank 0 sees in {root} is not there for another process",
            expected="--out in a folder that all machines share",
            got=f"no {error.filename}",
        ) from error


def _limit(
    stream: ActivationStream, seconds: float, rows_per_second: float, config: FitConfig
) -> str:
    waits = Waits(
        seconds, stream.seconds_waited, stream.seconds_to_first, stream.seconds_for_shards
    )
    return sentence(waits, rows_per_second * stream.row_bytes, config.verify)


def _how_it_reads(record: RunRecord, tuning: Tuning, row_bytes: int) -> str:
    """One line: what is held, and how it is read."""
    plan = record.plan
    pool = min(plan.window, plan.lane_rows) * plan.lanes
    speed = tuning.why_not
    if tuning.bytes_per_second is not None:
        speed = f"{format_bytes(tuning.bytes_per_second)}/s in a probe"
    return (
        f"fit: {pool:,} rows are mixed in memory ({format_bytes(pool * row_bytes)}); read by "
        f"{tuning.reading}, up to {spare_windows(plan.lanes)} of {plan.lanes} windows ahead "
        f"({speed})"
    )


def _epochs(record: RunRecord) -> int | None:
    """Epochs after which the run ends; None where its steps alone say it."""
    return record.options.epochs if record.options.max_tokens is None else None


def _ended_early(record: RunRecord, steps: int) -> tuple[str, ...]:
    """A warning if there were fewer rows than the harvest's goal promised."""
    if steps == record.steps:
        return ()
    falls = any(_falls(entry.options) for entry in record.saes)
    rate = "; the learning rate did not reach its end" if falls else ""
    return (
        f"the run ended after {steps:,} of {record.steps:,} planned steps: the text ended before "
        f"the harvest's goal, or filters dropped rows{rate}",
    )


def _falls(options: SaeOptions) -> bool:
    """Whether the learning rate ends lower than its peak."""
    signum = options.optimizer == "signum"
    return (options.lr_schedule or ("constant" if signum else "linear")) != "constant"


def _open(config: FitConfig) -> Cache:
    return Cache.open(
        config.cache,
        block_cache=config.block_cache,
        block_cache_bytes=config.block_cache_bytes,
    )


def _device(config: FitConfig) -> torch.device:
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: the encoder's product is most of a step
    return device


def _row_bytes(record: RunRecord, cache: Cache) -> int:
    """Bytes of a row, of all hookpoints of the run."""
    hookpoints = hookpoints_of(record.saes)
    return sum(cache.codec.row_bytes(cache.manifest.width(name)) for name in hookpoints)


def _bests(root: Path, record: RunRecord) -> dict[str, Best]:
    """Each SAE's best validation, as the newest checkpoint names it."""
    state = newest_state(root)
    saes = () if state is None else state.saes
    named = zip(record.saes, saes, strict=False)
    return {entry.name: sae.best for entry, sae in named if sae.best is not None}


def _missing_shards(cache: Cache) -> tuple[str, ...]:
    """A warning if the harvest of the cache is not at its end."""
    if cache.complete:
        return ()
    planned = "all that the text gives"  # a harvest without --max-tokens
    if cache.end is not None:
        planned = str(cache.end.last_shard + 1)
    elif cache.manifest.plan.shards is not None:
        planned = str(cache.manifest.plan.shards)
    return (
        f"{cache.root} is not complete: shards there {len(cache.shards)}, planned {planned}; the "
        "run uses those that are there now (--follow waits for more)",
    )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("actcache", "torch", "schedulefree")}


def _is_begun(config: FitConfig, root: Path) -> bool:
    """Whether the folder holds a run to go on with; raises `RunError` if it must not be used."""
    if (root / RUN).exists():
        if not config.resume:
            raise RunError(
                f"{root} holds a run already",
                remedy="--resume to go on with it, or another --out",
            )
        return True
    if root.exists():
        if not root.is_dir():
            raise RunError(f"--out {root} is a file", expected="a new or empty folder")
        # A run killed before or while it wrote its first file has not begun.
        names = {path.name for path in root.iterdir()} - {str(LOCK)}
        if any(not name.startswith(f".{RUN}.") for name in names):
            what = "a cache" if (root / MANIFEST).exists() else "other things"
            raise RunError(f"--out {root} holds {what}", expected="a new or empty folder")
    return False


def _go_on(
    config: FitConfig, cache: Cache, root: Path, crew: Crew
) -> tuple[RunRecord, tuple[str, ...], tuple[str, ...]]:
    """The record of the run that is there, checked against what is asked now.

    Returns:
        It with the options of now, what has changed since it was last written, and warnings.
    """
    config = _of_the_run(config)
    record = read_run(root)
    check_same_cache(record, cache)
    options = changed_options(record, config)
    record = dataclasses.replace(record, wandb_id=record.wandb_id or new_id(config))
    asked = dataclasses.replace(record, options=config)
    if options and config.force_config:
        saes = entries_of(config, cache, functools.partial(_kinds_of, record))
        done = newest_step(root) or 0
        asked = force(record, config, options, saes, _forced_steps(record, config), done)
    else:
        check_same_run(record, asked)
    now = _versions()
    last = record.history[-1].versions if record.history else record.versions
    libraries = [
        f"{name}: {then} then, {now.get(name)} now"
        for name, then in last.items()
        if now.get(name) != then
    ]
    warnings = tuple(
        f"{name} is {now.get(name)} now; this run was begun with {then}"
        for name, then in record.versions.items()
        if now.get(name) != then
    )
    parts = crew.processes if crew.shares_batches else 1
    shares = []
    if parts != record.batch_parts:
        shares = [f"processes that share each batch: {record.batch_parts} then, {parts} now"]
        warnings += (f"{shares[0]}: the batches are the same, but sums are rounded otherwise",)
    asked = dataclasses.replace(asked, batch_parts=parts)
    return asked, (*options.values(), *libraries, *shares), warnings


def _of_the_run(config: FitConfig) -> FitConfig:
    """Without what is of this start, not of the run."""
    return dataclasses.replace(config, parallel=None)


def _kinds_of(record: RunRecord, entries: Sequence[SaeEntry]) -> list[SaeConfig]:
    """What the SAEs of a run with --finetune are under other options: where they began is past."""
    return [
        sae.config
        if entry.options.sparsity is None
        else dataclasses.replace(sae.config, sparsity=entry.options.sparsity)
        for sae, entry in zip(record.saes, entries, strict=False)
    ]


def _forced_steps(record: RunRecord, config: FitConfig) -> int:
    """Steps of a run under other options."""
    if config.follow:
        return _whole_updates(config, record.steps)
    return _steps(config, record.plan.steps_per_epoch)


def _write_changes(
    root: Path, record: RunRecord, first_step: int, changes: tuple[str, ...]
) -> None:
    """Write down what is not as it was when the run was last started.

    Options that touch no result are left as they were given first. The cache's place is that of
    now: `saetrain eval` must find it.
    """
    old = read_run(root)
    new = dataclasses.replace(old, cache=place_of(record.options.cache), wandb_id=record.wandb_id)
    if first_step < record.steps:
        if changed_options(old, record.options):
            new = dataclasses.replace(record, cache=new.cache)
        new = dataclasses.replace(new, batch_parts=record.batch_parts)
        new = with_change(new, first_step, changes, _versions())
    if new != old:
        write_run(root, new)


@dataclass(frozen=True)
class _Restored:
    """What a run goes on from; by default, its beginning."""

    step: int = 0
    """Steps done."""
    stream: dict[str, int] = field(default_factory=dict)
    """State of the stream."""
    warnings: tuple[str, ...] = ()
    """One if a newer checkpoint is damaged."""


def _restore(
    root: Path, record: RunRecord, trainees: list[Trainee], follower: Follower | None, crew: Crew
) -> _Restored:
    """Put back the newest checkpoint that is whole, if there is one, and all that lies beside it.

    Raises:
        FormatError: all are damaged, or it belongs to another run.
    """
    warnings: list[str] = []

    def fell_back(error: FormatError, step: int) -> None:
        warnings.append(
            f"{error.what}: the newest checkpoint is damaged; going on from step {step:,}, and all "
            "that came after it is done again"
        )

    wanted = {trainee.number for trainee in trainees}
    if crew.leads:
        check = functools.partial(_require_bests, root, record)
        checkpoint = load_checkpoint(root, wanted, check, fell_back)
        crew.tell(_Chosen(None if checkpoint is None else checkpoint[0].step))
    else:
        step = crew.hear(_Chosen).step
        checkpoint = None if step is None else load_parts(root, step, wanted)
    if checkpoint is not None:
        _put_back(root, record, trainees, follower, *checkpoint)
    crew.wait()  # nobody removes what another one still reads
    if crew.leads and checkpoint is not None:
        keep = Keep(record.options.keep_last, record.options.keep_every)
        remove_others(root, checkpoint[0].step, keep)
    crew.wait()
    if crew.saves:
        forget_other_bests(root, trainees)
    if checkpoint is None:
        return _Restored()
    state, _ = checkpoint
    for trainee in trainees if crew.saves else ():
        exported = root / trainee.entry.name / WEIGHTS
        written = state.saes[trainee.number].export
        if not exported.is_file() or digest_file(exported) != written:  # of a later step
            export(root, trainee)
    return _Restored(state.step, state.stream, tuple(warnings))


@dataclass(frozen=True)
class _Chosen:
    """The checkpoint that a run goes on from."""

    step: int | None
    """Steps done; None: there is none."""


def _put_back(
    root: Path,
    record: RunRecord,
    trainees: list[Trainee],
    follower: Follower | None,
    state: State,
    tensors: list[dict[str, Tensor]],
) -> None:
    """Load a checkpoint into what is trained; raises `FormatError` if it is not of this run."""
    if follower is None:
        epoch, step = divmod(state.step, record.plan.steps_per_epoch)
        place: dict[str, int] | None = {"epoch": epoch, "step": step}
    else:
        place = follower.place_after(state.step, _epochs(record))
    fits = len(tensors) == len(record.saes) and 0 <= state.step <= record.steps
    if not fits or state.stream != place:
        expected = f"{len(record.saes)} SAEs, step 0 to {record.steps}, the stream at {place}"
        got = f"{len(tensors)} SAEs, step {state.step}, the stream at {state.stream}"
        raise _foreign_checkpoint(root, expected, got)
    for trainee in trainees:
        part, sae = tensors[trainee.number], state.saes[trainee.number]
        try:
            trainee.load_state(part, sae.numbers)
        except (KeyError, RuntimeError) as error:
            raise _foreign_checkpoint(root, f"the state of {trainee.entry}", error) from error
        trainee.best = sae.best


def _require_bests(root: Path, record: RunRecord, state: State) -> None:
    """Raise `FormatError` if a best SAE that a checkpoint names is not as it was saved."""
    for entry, sae in zip(record.saes, state.saes, strict=False):
        if sae.best is None:
            continue
        path = best_folder(root / entry.name, sae.best.step) / WEIGHTS
        got = digest_file(path) if path.is_file() else "nothing"
        if got != sae.best.file:
            raise FormatError(
                f"{path} is not what its checkpoint wrote", expected=sae.best.file, got=got
            )


def _foreign_checkpoint(root: Path, expected: object, got: object) -> FormatError:
    return FormatError(
        f"{root} holds a checkpoint that is not of this run",
        expected=expected,
        got=got,
        remedy="restore it from a copy, or remove checkpoint-* there and begin the run anew with "
        "--resume",
    )


def _held_out_rows(record: RunRecord, cache: Cache, trainees: list[Trainee]) -> Validation | None:
    """What a run validates on, if it does."""
    options = record.options
    if options.val_every is None:
        return None
    hookpoints = hookpoints_of([trainee.entry for trainee in trainees])
    held_out = record.held_out
    return Validation(
        cache, hookpoints, record.training_shards, held_out, options.val_rows, options.verify
    )


def budget_of(config: FitConfig, cache: Cache, hookpoints: list[str]) -> Budget:
    """How many rows are mixed in memory, and how many batches wait."""
    if config.pool_rows is not None:
        return Budget(config.pool_rows, PREFETCH_BATCHES)
    return spend(config.buffer_bytes, cache.manifest, hookpoints, config.batch_size)


def _decide(config: FitConfig, cache: Cache, device: torch.device, crew: Crew) -> RunRecord:
    origins = None if config.finetune is None else Origins(config.finetune)
    entries = entries_of(config, cache, None if origins is None else origins.kinds)
    pool_rows = budget_of(config, cache, hookpoints_of(entries)).pool_rows
    decide = _order_in_segments if config.follow else _order
    order = decide(config, cache, pool_rows)
    steps = _steps(config, order.epoch_steps)
    epoch_steps = steps if order.epoch_steps is None else order.epoch_steps
    training = [shard for shard, _ in order.plan.shards]
    first = FirstRows(cache, order.plan)
    statistics_of = functools.cache(lambda name: cache.statistics(name, training))
    entries = tuple(
        with_scales(entry, config.of(entry.options), statistics_of, first, device)
        for entry in entries
    )
    return RunRecord(
        format_version=FORMAT_VERSION,
        cache=place_of(config.cache),
        cache_id=cache.manifest.cache_id,
        receipts_digest=receipts_digest(cache, training, order.held_out),
        held_out=tuple(order.held_out),
        plan=order.plan,
        steps=steps,
        dead_after=config.dead_after
        or min(_DEAD_AFTER, min(steps, epoch_steps) * order.plan.batch_size),
        saes=entries,
        options=_of_the_run(config),
        versions=_versions(),
        segment_shards=order.segment_shards,
        extensions=len(cache.manifest.extensions) if config.follow else None,
        pool_rows=pool_rows,
        wandb_id=new_id(config),
        origins=() if origins is None else origins.sources(entries),
        batch_parts=crew.processes if crew.shares_batches else 1,
    )


@dataclass(frozen=True)
class _Order:
    """What a run trains on, and how long an epoch is."""

    plan: OrderPlan
    held_out: list[int]
    epoch_steps: int | None
    """None if that cannot be known."""
    segment_shards: int | None


def _order(config: FitConfig, cache: Cache, pool_rows: int) -> _Order:
    """All shards that are there now, as one."""
    cache.require_shards()
    seed = config.order_seed
    training, held_out = split_shards(cache.shards, config.val_fraction, seed)
    shards = [(shard, cache.receipts[shard].rows) for shard in training]
    plan = make_plan(shards, cache.manifest.block_rows, config.batch_size, seed, pool_rows)
    return _Order(plan, held_out, plan.steps_per_epoch, None)


def _order_in_segments(config: FitConfig, cache: Cache, pool_rows: int) -> _Order:
    """Segments; waits until the first one is there."""
    manifest = cache.manifest
    segmentation = Segmentation(
        shards_each=config.segment_shards
        or default_shards_each(manifest, config.batch_size, pool_rows),
        block_rows=manifest.block_rows,
        batch_size=config.batch_size,
        seed=config.order_seed,
        pool_rows=pool_rows,
        val_fraction=config.val_fraction,
    )
    epoch_steps = None
    promised = dict.fromkeys(segmentation.shards(0), manifest.shard_rows)
    # A harvest of less text than its goal has a seal that says so, and must not change the steps.
    sealed = None if cache.end is None else cache.end.sequences
    goals = [goal for goal in (manifest.plan.goal, sealed) if goal is not None]
    if goals:
        rows = goal_rows(manifest, max(goals))
        epoch_steps = segmentation.steps(rows)
        promised = {shard: rows[shard] for shard in promised if shard in rows}
    _steps(config, epoch_steps)  # what cannot be is refused now, not after hours of waiting
    require_batch(segmentation, promised)
    plan = first_segment(cache, segmentation)
    held_out = [s for s in segmentation.shards(0, cache.shards[-1]) if segmentation.is_held_out(s)]
    return _Order(plan, held_out, epoch_steps, segmentation.shards_each)


def _steps(config: FitConfig, epoch_steps: int | None) -> int:
    """Steps of the whole run; with --follow, unless --max-tokens says it, the most it can have."""
    if config.max_tokens is None:
        if epoch_steps is None:
            raise ConfigError(
                f"how many steps --follow will make cannot be known: the harvest of {config.cache} "
                "has no goal",
                remedy="--max-tokens N",
            )
        return _whole_updates(config, config.epochs * epoch_steps)
    steps = config.max_tokens // config.batch_size
    if steps == 0:
        raise ConfigError(
            "--max-tokens is less than one batch",
            expected=f">= --batch-size {config.batch_size}",
            got=config.max_tokens,
        )
    return _whole_updates(config, steps)


def _whole_updates(config: FitConfig, steps: int) -> int:
    """So many steps, without the last ones if they do not fill an update.

    Raises:
        ConfigError: an option counts more steps than the run has.
    """
    whole = steps // config.grad_acc_steps * config.grad_acc_steps
    saes = config.saes or (config.sae,)
    for name, value in (
        ("--grad-acc-steps", config.grad_acc_steps),
        ("--lr-decay-steps", max(sae.lr_decay_steps or 0 for sae in saes)),
        ("--k-anneal-steps", max(sae.k_anneal_steps for sae in saes)),
    ):
        if value > (steps if name == "--grad-acc-steps" else whole):
            raise ConfigError(
                f"{name} is longer than the run", expected=f"<= {whole or steps}", got=value
            )
    return whole


def entries_of(config: FitConfig, cache: Cache, kinds: Kinds | None = None) -> tuple[SaeEntry, ...]:
    """The SAEs that a run trains, hookpoint after hookpoint.

    Args:
        config: the options.
        cache: its cache.
        kinds: with --finetune, what they are, from what they would be; None: what is found.
    """
    wirings = wire(config, cache)
    require_overrides_used(config, [wiring.name for wiring in wirings])
    entries = tuple(
        _entry(config, wiring, cache, setting, options)
        for wiring in wirings
        for setting, options in saes_at(config, wiring.name).items()
    )
    if config.finetune is None:
        return entries
    kinds = kinds or Origins(config.finetune).kinds
    return tuple(map(_with_kind, entries, kinds(entries)))


def _with_kind(entry: SaeEntry, kind: SaeConfig) -> SaeEntry:
    lr = entry.options.lr
    if lr is None:
        lr = default_lr(entry.options.optimizer, kind.num_latents)
    return dataclasses.replace(entry, config=kind, lr=lr)


def _entry(
    config: FitConfig, wiring: Wiring, cache: Cache, setting: str, options: SaeOptions
) -> SaeEntry:
    """One SAE's kind, sizes and learning rate."""
    width = cache.manifest.width
    reads = wiring.reads or (wiring.name,)
    widths = tuple(width(name) for name in reads)
    num_latents = options.num_latents or max(widths) * options.expansion_factor
    d_out = sum(map(width, wiring.predicts))
    sparsity = options.sparsity
    if sparsity is None:
        sparsity = PENALISED.get(options.activation, 0.0)
    sizes = SaeConfig(
        sum(widths),
        num_latents,
        options.k,
        activation=options.activation,
        multi_topk=options.multi_topk,
        matryoshka=options.matryoshka,
        transcode=config.transcode,
        skip_connection=config.skip_connection,
        d_out=d_out if d_out and d_out != sum(widths) else None,
        widths=widths if config.crosscode else (),
        sparsity=sparsity,
        threshold=SaeConfig.threshold if options.threshold is None else options.threshold,
        bandwidth=SaeConfig.bandwidth if options.bandwidth is None else options.bandwidth,
    )
    lr = options.lr if options.lr is not None else default_lr(options.optimizer, num_latents)
    return SaeEntry(
        wiring.name, sizes, lr, options.seed, setting, options, wiring.reads, wiring.predicts
    )


def _build(
    record: RunRecord,
    cache: Cache,
    device: torch.device,
    numbers: Sequence[int],
    shares_batches: bool = False,
) -> list[Trainee]:
    """The SAEs of these numbers with their optimisers, b_dec at the mean of the training rows."""
    if record.options.autocast:
        require_bfloat16_products(device)
    # Once for each hookpoint: they are merged from as many files as there are shards.
    statistics_of = functools.cache(lambda name: cache.statistics(name, record.training_shards))
    trainees = []
    for number in numbers:
        entry = record.saes[number]
        sizes, options = entry.config, record.options.of(entry.options)
        targets = targets_of(entry, statistics_of)
        sae = initial_sae(entry, targets, options, device)
        optimizer = make_optimizer(
            options.optimizer,
            sae,
            entry.lr,
            options.lr_warmup_steps,
            record.steps,
            schedule=make_schedule(options, record.steps),
            weight_decay=options.weight_decay,
        )
        rise = options.sparsity_warmup_steps
        objective = objective_of(sizes, record.steps // 20 if rise is None else rise, targets.parts)
        trainees.append(
            Trainee(
                entry,
                sae,
                optimizer,
                Firing(sizes.num_latents, record.dead_after, device),
                Meter(device, objective.names),
                targets.variance,
                objective,
                make_recipe(options, sizes),
                number=number,
                shared=SharedBatches(sae) if shares_batches else None,
            )
        )
    return trainees
