"""The forward and backward passes of a step as one CUDA graph.

A step of small kernels is a thousand starts, and on many machines the host takes longer for those than the GPU for the
kernels. A graph is recorded once, and then started by one call.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from mfdist.errors import ConfigError

#: Steps made one kernel at a time first: what they compile and allocate once must be there before a graph is recorded.
EAGER_STEPS = 3

Parts = Sequence[tuple[Tensor, Tensor]]
Passes = Callable[[Parts], Tensor]


def check_graph(device: torch.device, world_size: int, elsewhere: str | None) -> None:
    """Raise ConfigError unless passes can be recorded: nothing in them waits for the host or another process.

    Args:
        device: of the model.
        world_size: ranks that train it.
        elsewhere: what of the model this process does not hold, if anything.
    """
    if device.type != "cuda" or world_size > 1 or elsewhere is not None:
        rest = "" if elsewhere is None else f", and {elsewhere} elsewhere"
        raise ConfigError(
            "training.cuda_graph=true needs one GPU that holds the whole model; "
            f"got device={device.type}, world_size={world_size}{rest}; set it to false"
        )


class StepGraph:
    """Runs passes that leave gradients in parameters: the first steps as they are, those after as a recorded graph.

    What the passes read besides their arguments, such as parameters and rates, must stay at its place in memory. The
    graph keeps the memory of its activations and gradients between steps.

    Args:
        parameters: whose gradients passes make.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        #: Of the passes, before and while they are recorded: autograd's nodes remember the stream they began in.
        self._stream: torch.cuda.Stream | None = None
        self.forget()

    @property
    def is_recorded(self) -> bool:
        """Return whether steps are started as a graph by now."""
        return self._graph is not None

    def forget(self) -> None:
        """Give the graph and its memory back; it is recorded anew after some more steps."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._loss = torch.empty(0)
        self._gradients: list[Tensor | None] = []
        self._num_eager = 0

    def __call__(self, passes: Passes, parts: Parts) -> Tensor:
        """Return the loss, which the next call changes, and leave the gradients in the parameters.

        Args:
            passes: micro-batches' inputs and targets → the step's loss; the same at each call. No gradients are there
                when it is called.
            parts: of the same number and shapes at each call.
        """
        if self._graph is None and self._num_eager < EAGER_STEPS:
            self._num_eager += 1
            return self._aside(passes, parts)
        if self._graph is None:
            self._graph = self._recorded(passes, parts)
        for kept, given in zip(self._parts, parts, strict=True):
            for old, new in zip(kept, given, strict=True):
                old.copy_(new)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss

    def _aside(self, passes: Passes, parts: Parts) -> Tensor:
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = passes(parts)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _recorded(self, passes: Passes, parts: Parts) -> torch.cuda.CUDAGraph:
        self._parts = [(inputs.clone(), targets.clone()) for inputs, targets in parts]
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: one may be copying a checkpoint.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._loss = passes(self._parts)
        self._gradients = [parameter.grad for parameter in self._parameters]
        return graph
