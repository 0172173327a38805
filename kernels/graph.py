"""A function that launches work on preallocated buffers, as CUDA graphs."""

import atexit
import contextlib
import gc
import sys

import torch

from cli import first_line


class GraphedFunction:
    """GraphedFunction(function, device)(key) has the effect of function(key), on CUDA by replay.

    The first call with a key runs the function, which compiles kernels; the second captures it.
    Where that fails, every call runs the function, and one line on stderr says so. What the
    function reads and writes is copied into between calls, never replaced.
    """

    def __init__(self, function, device):
        self.function, self.device, self.is_enabled = function, device, device.type == "cuda"
        self.graphs = {}  # key -> graph, None before the second call
        # A process group cannot end while a graph holds its operations; atexit runs in reverse.
        atexit.register(self.graphs.clear)

    def __call__(self, key):
        if self.is_enabled and key in self.graphs and self.graphs[key] is None:
            try:
                self.graphs[key] = self.capture(key)
            except Exception as error:  # errors of CUDA have no type of their own
                self.is_enabled = False
                self.graphs.clear()
                reason = f"CUDA graph: not captured ({first_line(error)})"
                print(f"{reason}; kernels are launched one by one", file=sys.stderr)
        graph = self.graphs.setdefault(key)
        graph.replay() if graph else self.function(key)

    def capture(self, key):
        """A graph of function(key). A failure leaves stream and random generator as they were."""
        gc.collect()  # an old graph that is freed during a capture spoils it
        torch.cuda.synchronize(self.device)
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        saved, graph = generator.clone_state(), torch.cuda.CUDAGraph()
        try:
            # Unlike torch.cuda.graph, this leaves the stream on an error too. A thread of NCCL
            # asks the driver about events, which the mode "global" takes for an error.
            with torch.cuda.stream(torch.cuda.Stream(self.device)):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.function(key)
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # that the capture is invalid
                        graph.capture_end()
                    raise
                graph.capture_end()
        except Exception:
            generator.graphsafe_set_state(saved)  # the old state expects a capture to go on
            raise
        return graph
