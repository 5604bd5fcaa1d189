"""The PTX machine: executes PTX that Triton compiled for an NVIDIA GPU on a CPU, and checks it.

    from tests.tools.ptx import launches

    with launches.compiled_for(90):
        layer_norm(x, weight)  # launches on CPU tensors run as PTX for sm_90

``parser`` reads PTX, ``forms`` lists the supported instructions and modifiers, ``instructions``
translates them into the machine's operations, ``machine`` builds and drives the C++ program that
executes these, ``launches`` compiles kernels for their arguments and lays out the parameters.
``coverage`` and ``mutations`` measure what the tests cover.
"""
