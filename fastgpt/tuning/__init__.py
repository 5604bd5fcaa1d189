"""Which launch configurations are fastest on this GPU, for the shapes of one model.

    from fastgpt.tuning import Workload, tune
    table, left = tune(Workload(GPTConfig(), batch_size=32), torch.device("cuda"), seconds=180)

A model of one layer shows which ops a training step calls, on which tensors; each call shows which
lines of the launch tables it asks for. Of a line's candidates, those that the compiler refuses or
whose outputs and gradients err more than the parity rule allows are left out. The others are timed
in turns, on the model's own tensors, forward or backward. One replaces the present line if it is
faster by 1% and by more than the noise. What is decided is written at once, so that the next
``tune`` goes on where this one was stopped. float32 keeps the lines of ``configs.TABLE``, but for
kernels whose lines do not depend on the dtype; so do decoding and fp8.
"""

from fastgpt.tuning.table import Line, Table, exported, summary
from fastgpt.tuning.tuner import tune
from fastgpt.tuning.workload import Workload

__all__ = ["Line", "Table", "Workload", "exported", "summary", "tune"]
