"""A pretended CUDA device for a PyTorch built without CUDA, to execute host code on.

    python -m tests.tools.pretend_cuda [--interpret] (SCRIPT | -m MODULE) ARGUMENTS

runs a program in which ``torch.cuda.is_available()`` is true. CUDA tensors are in host memory, and
all operators run on the CPU. ``torch.cuda``, streams and threads of autograd, autocast,
``torch.optim`` and custom operators are PyTorch's own code. A Triton launch fills its outputs with
values that depend on everything it reads, or is interpreted (``--interpret``).

Operations that CUDA forbids during capture raise. Behaviour that would be undefined or
nondeterministic on a real device is a finding (``device.findings``); the program then ends with
status 70:

- two streams use the same memory without synchronisation, and one of them writes it;
- memory is freed while a stream other than its own may still use it, without ``record_stream``;
- the host changes pinned memory before the copy from it is done, or never waits for a copy to it
  (until then the destination holds NaN);
- a capture waits for work outside of it, covers work on a second stream, compiles a kernel or
  records nothing.

A replay repeats the recorded calls on the recorded addresses; it raises if memory was freed since.
"""
