"""The training loop: from a run's directory to a trained, checkpointed model.

`train` is the whole of it: prepare the data, build or load the model, step, validate, save, stop. Everything it has to
say goes to an observer as events; it neither prints nor draws.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from statistics import median

import torch

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.state import CheckpointState
from mfdist.config import RunConfig
from mfdist.errors import ConfigError, MfdistError
from mfdist.models import Transformer, build_model
from mfdist.models.loads import table_specs
from mfdist.sharding.plan import ShardingPlan
from mfdist.training.data.batches import BatchOrder, TokenBatches
from mfdist.training.data.ngram import baselines
from mfdist.training.data.token_store import TokenStore, prepare_tokens
from mfdist.training.device import describe_device, deterministic
from mfdist.training.events import (
    Event,
    Failed,
    Observer,
    Sampled,
    Started,
    Stopped,
    TwinTimed,
    Warned,
    ignore,
)
from mfdist.training.generation import GenerationConfig, Generator
from mfdist.training.interrupts import StopRequest, stop_on_signals
from mfdist.training.metrics import MetricsFile, TensorBoard, read_metrics
from mfdist.training.optimizer import RunOptimizer, table_parameter_names
from mfdist.training.resumption import check_commits, notices
from mfdist.training.run import RunDirectory
from mfdist.training.saver import RunSaver
from mfdist.training.spread import plan_of, shares_memory
from mfdist.training.state import capture, check_config, check_data, held_regions, load_training
from mfdist.training.step import TrainStep
from mfdist.training.step_graph import check_graph
from mfdist.training.stepping import Stepping
from mfdist.training.table_home import TableHome
from mfdist.training.twin import time_dense_twin
from mfdist.training.validation import Validation
from mfdist.training.world import World, joined
from mfdist.training.writing import writing

NUM_SAMPLE_TOKENS = 100


def train(
    run: RunDirectory,
    *,
    overrides: Sequence[str] = (),
    observer: Observer = ignore,
    table_home: TableHome | None = None,
) -> Stopped:
    """Train a run from its last committed step, or from the start, to its configured number of steps.

    SIGINT and SIGTERM finish the step, save, and end it early; the run goes on when `train` is called again.

    Args:
        run: from `RunDirectory.create` or `open`.
        overrides: `section.key=value` changes to a run that is continued, stored once training can go on with them.
        observer: told every event.
        table_home: where the tables lie, if not in the ranks.

    Returns:
        Where and why training stopped.

    Raises:
        ConfigError, DataError: the configuration or the text is wrong; nothing was trained.
        ConsistencyError: the run's text has changed since its checkpoint.
        NonFiniteError: loss or gradients became NaN or infinite; earlier commits stand.
        CheckpointError: a checkpoint could not be written or read; earlier commits stand. Or the run has saved and its
            checkpoints are gone; nothing was changed.
        UnavailableError: another process trains this run.

    Called on: every rank of the run, in its main thread where signals are to be caught. Ranks are those that torchrun
        started, or of a process group that is set up. Rank 0 writes the run's files and is observed.
    """
    start = time.monotonic()
    with ExitStack() as stack:
        config = run.config_with(overrides)
        world = stack.enter_context(joined(config))
        observer = observer if world.is_first else ignore
        checkpoints = CheckpointDirectory(run.checkpoints.path, ranks=world.checkpoint_ranks())

        def claim() -> None:
            check_commits(run)
            stack.enter_context(checkpoints.writer_lock())

        world.on_first(claim)
        observers: list[Observer] = [observer]

        def tell(event: Event) -> None:
            for each in observers:
                each(event)

        stack.enter_context(deterministic(config.training.is_deterministic))
        session = _Session.prepare(run, checkpoints, config, world, tell, table_home)
        # From here on there is something to save. Told from inside the handler: to the caller alone, since a file may
        # be half way through a line.
        request = stack.enter_context(stop_on_signals(lambda message: observer(Warned(message=message))))
        if world.is_first:
            metrics = MetricsFile(run.metrics_path, session.first_step)
            stack.callback(metrics.close)
            observers.append(metrics)
        if world.is_first and session.config.training.tensorboard:
            board = TensorBoard(run.path / "tensorboard")
            stack.callback(board.close)
            observers.append(board)
        tell(session.started())
        try:
            step, reason = session.run(request, tell)
        except (MfdistError, KeyboardInterrupt) as error:
            with suppress(MfdistError):  # the disk may be what failed
                tell(Failed(kind=getattr(error, "kind", "interrupted"), message=str(error)))
            raise
        stopped = Stopped(
            run_dir=run.path,
            step=step,
            last_step=session.config.training.steps,
            reason=reason,
            elapsed_s=time.monotonic() - start,
            is_saved=session.config.checkpoint.every > 0,
        )
        tell(stopped)
    return stopped


class _Session:
    """One stretch of training: everything that lives from `train`'s start to its end."""

    def __init__(
        self,
        run: RunDirectory,
        checkpoints: CheckpointDirectory,
        config: RunConfig,
        world: World,
        store: TokenStore,
        model: Transformer,
        optimizer: RunOptimizer,
        train_step: TrainStep,
        first_step: int,
        twin_tokens_per_s: float | None,
        table_home: TableHome | None,
        is_new: bool,
    ) -> None:
        self.run_directory = run
        self.config = config
        self.first_step = first_step
        self._world = world
        self._store = store
        self._model = model
        self._optimizer = optimizer
        self._device = next(model.parameters()).device
        self._checkpoints = checkpoints
        self._validate = Validation(
            model, store, config, world, can_redraw=_can_redraw(run, self._device, is_new), keep=run.write_table_use
        )
        self._stepping = Stepping(
            train_step,
            _batches(config, store, world).at,
            config,
            self._device,
            first_profiled=first_step + 2,  # not the first two, which compile
        )
        self._twin_tokens_per_s = twin_tokens_per_s
        self._table_home = table_home
        self._is_new = is_new

    @classmethod
    def prepare(
        cls,
        run: RunDirectory,
        checkpoints: CheckpointDirectory,
        config: RunConfig,
        world: World,
        tell: Observer,
        table_home: TableHome | None,
    ) -> "_Session":
        """Read the text, build the model, and load the last commit where there is one.

        The run's files are written only once everything fits together, so that a refusal leaves them as they were.
        """
        device = world.device
        if config.training.cuda_graph:
            check_graph(device, world.world_size, None if table_home is None else "the tables")
        store = prepare_tokens(config.data, observer=tell)
        config = _with_vocabulary(config, store)
        batches = _batches(config, store, world)
        # Which step is decided by one rank: another's file system may show it later.
        step = world.first_says(lambda: checkpoints.steps()[-1].step if checkpoints.steps() else None)
        state = None if step is None else checkpoints.load(step, tables=())
        if state is not None:
            check_data(state, store.fingerprint)
            check_config(state, config)
            if config.training.steps < state.step:
                raise ConfigError(
                    f"training.steps must be at least the {state.step} steps that are done; got {config.training.steps}"
                )
        for notice in notices(run, step) if world.is_first else ():
            tell(notice)
        twin = None
        if config.training.twin_steps and config.model.kind == "memory" and world.is_alone:
            timed = read_metrics(run.metrics_path, "twintimed") if state is not None else []
            twin = timed[-1]["tokens_per_s"] if timed else time_dense_twin(config, batches, device, tell)
        torch.manual_seed(config.training.seed)
        with device:
            is_here = world.is_alone and table_home is None
            model = build_model(config.model, table_device=None if is_here else "meta")
        if table_home is not None:
            table_home.move_in(model, world, is_loaded_next=state is not None)
        spread = world.spread(model, config)
        optimizer = RunOptimizer(model, config.optimizer, seed=config.training.seed, world=world)
        if state is not None:
            load_training(model, optimizer, checkpoints.load(state.step, tables=(), shards=held_regions(model)))
            if table_home is not None:
                table_home.load(run, state.step, world)
        elif table_home is not None:
            table_home.check_new()
        num_holders = (
            world.world_size if table_home is None else len(config.servers.addresses) // config.servers.replicas
        )
        world.on_first(lambda: _write(run, config, store, plan_of(model, num_holders)))
        train_step = TrainStep(model, optimizer, config.training, device, world=world, spread=spread)
        first_step = 0 if state is None else state.step
        return cls(
            run,
            checkpoints,
            config,
            world,
            store,
            model,
            optimizer,
            train_step,
            first_step,
            twin,
            table_home,
            state is None,
        )

    def started(self) -> Started:
        """Return what is told before the first step."""
        tables = table_parameter_names(self._model)
        in_tables = sum(spec.num_rows * spec.row_dim for spec in table_specs(self._model))
        others = sum(value.numel() for name, value in self._model.named_parameters() if name not in tables)
        ranks = "" if self._world.is_alone else f"{self._world.world_size} ranks, each: "
        sharing = "; they can write into each other's memory" if shares_memory(self._model) else ""
        return Started(
            run_dir=self.run_directory.path,
            name=self.config.name,
            kind=self.config.model.kind,
            device=f"{ranks}{describe_device(self._device)}{sharing}",
            first_step=self.first_step,
            last_step=self.config.training.steps,
            num_table_parameters=in_tables,
            num_dense_parameters=others,
            num_train_tokens=len(self._store.train),
            tokens_per_step=self.config.training.batch_size * self.config.training.seq_len,
            baselines_bits_per_byte=baselines(self._store) if self._world.is_first else {},
            device_type=self._device.type,
            num_ranks=self._world.world_size,
            num_hosts=self._world.num_hosts,
        )

    def run(self, request: StopRequest, tell: Observer) -> tuple[int, str]:
        """Step until the end or a request to stop; return the last finished step and the reason."""
        training, checkpoint = self.config.training, self.config.checkpoint
        step = saved = self.first_step
        with RunSaver(self._checkpoints, checkpoint, tell) as saver:
            if self._is_new and self._table_home is not None and checkpoint.every:
                # Rows elsewhere outlive this process: should it die before the first commit, they go back to this one.
                saver.save(self._captured(step))
            while step < training.steps and not self._world.any(request.reason is not None):
                is_validated = (step + 1) % training.eval_every == 0 and step + 1 < training.steps
                is_saved = checkpoint.every > 0 and (step + 1) % checkpoint.every == 0
                for event in self._stepping.step(step, is_read=is_validated or is_saved):
                    tell(event)
                step += 1
                saver.report()
                if is_validated:
                    self._validate(step, training.eval_sequences, tell)
                if is_saved:
                    saver.save(self._captured(step))
                    saved = step
            for event in self._stepping.rest():
                tell(event)
            if checkpoint.every and step > saved:
                saver.save(self._captured(step))
            saver.finish()
        is_finished = step == training.steps
        if is_finished:
            self._validate(step, None, tell)
            self._sample(tell)
        self._compare_speed(tell)
        return step, "finished" if is_finished else str(self._world.first_found(request.reason))

    def _captured(self, step: int) -> CheckpointState:
        if self._table_home is not None:  # first: what commits the step must find its tables there
            self._table_home.save(self.run_directory, step, self._world)
        return capture(
            self._model, self._optimizer, step=step, config=self.config, data_fingerprint=self._store.fingerprint
        )

    def _sample(self, tell: Observer) -> None:
        if prompt := self.config.training.sample_prompt:
            generator = Generator(self._model.eval(), self._store.tokenizer, self.config.training.precision)
            text = "".join(generator.stream(prompt, GenerationConfig(num_tokens=NUM_SAMPLE_TOKENS)))
            tell(Sampled(prompt=prompt, text=text))

    def _compare_speed(self, tell: Observer) -> None:
        if self._twin_tokens_per_s is not None and self._stepping.seconds:
            tokens_per_step = self.config.training.batch_size * self.config.training.seq_len
            tell(
                TwinTimed(
                    tokens_per_s=self._twin_tokens_per_s,
                    model_tokens_per_s=tokens_per_step / median(self._stepping.seconds),
                    num_steps=self.config.training.twin_steps,
                )
            )


def _can_redraw(run: RunDirectory, device: torch.device, is_new: bool) -> bool:
    """Return whether tables drawn here have the first rows of the run, which another kind of device draws otherwise."""
    started = read_metrics(run.metrics_path, "started")
    return started[0].get("device_type") == device.type if started else is_new


def _batches(config: RunConfig, store: TokenStore, world: World) -> TokenBatches:
    training = config.training
    if training.batch_size % (world.world_size * training.micro_batches):
        raise ConfigError(
            "training.batch_size must be a multiple of ranks × micro_batches; got "
            f"batch_size={training.batch_size}, {world.world_size} ranks, micro_batches={training.micro_batches}"
        )
    order = BatchOrder(
        num_tokens=len(store.train),
        seq_len=config.training.seq_len,
        batch_size=config.training.batch_size,
        seed=config.training.seed,
        rank=world.rank,
        world_size=world.world_size,
    )
    return TokenBatches(store.train, order)


def _write(run: RunDirectory, config: RunConfig, store: TokenStore, plan: ShardingPlan | None) -> None:
    run.write_config(config)
    with writing(run.tokenizer_path):
        store.tokenizer.save(run.tokenizer_path)
    run.write_plan(plan)


def _with_vocabulary(config: RunConfig, store: TokenStore) -> RunConfig:
    size = store.tokenizer.vocab_size
    if config.model.vocab_size == 0:
        return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})
    if config.model.vocab_size < size:
        raise ConfigError(
            f"model.vocab_size must cover the tokenizer's {size} tokens; got {config.model.vocab_size}; "
            "leave it at 0 to take the tokenizer's"
        )
    return config
