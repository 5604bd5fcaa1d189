"""The PTX machine: runs what Triton compiles for an NVIDIA GPU on a CPU, and checks it.

    from tests.tools.ptx import launches

    with launches.compiled_for(90):
        layer_norm(x, weight)  # launches on CPU tensors run as PTX for sm_90

``parser`` reads PTX, ``forms`` lists the instructions and modifiers that are executed,
``instructions`` says what each is for the machine,
``machine`` builds and drives the C++ program that executes them, ``launches`` compiles kernels for
their arguments and lays out the parameters. ``coverage`` and ``mutations`` measure what tests see.
"""
