"""A CUDA device that is none, for a PyTorch built without CUDA: host code is executed on it.

    python -m tests.tools.pretend_cuda [--interpret] (SCRIPT | -m MODULE) ARGUMENTS

runs a program that finds ``torch.cuda.is_available()`` true. Every CUDA tensor lies in host memory,
and every operator runs on the CPU. ``torch.cuda``, streams and threads of autograd, autocast,
``torch.optim`` and custom operators are PyTorch's own code. A Triton launch fills what it would
have written with numbers that depend on all it reads, or is interpreted (``--interpret``).

What CUDA refuses in a capture raises. What would be undefined or differ from run to run on a real
device is a finding (``device.findings``), after which the program ends with status 70:

- two streams use the same memory without a wait between them, and one of them writes it;
- memory is freed while a stream other than its own may still use it, without ``record_stream``;
- the host changes pinned memory before the copy from it is done, or never waits for a copy to it
  (before it has, the destination holds NaN);
- a capture waits for work outside of it, covers work on a second stream, compiles a kernel or
  records nothing.

A replay runs what was recorded on the addresses that were recorded; one of memory that was freed
since then raises.
"""
