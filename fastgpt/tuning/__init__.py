"""Find the fastest launch configurations on this GPU for the shapes of one model.

    from fastgpt.tuning import Workload, tune
    table, left = tune(Workload(GPTConfig(), batch_size=32), torch.device("cuda"), seconds=180)

A forward pass of a one-layer model records which ops a training step calls on which tensors; each
call records which entries of the launch tables it looks up. Candidates for an entry are rejected if
they do not compile, or if the errors of outputs or gradients exceed the parity rule. The others are
timed in an interleaved order on the model's own tensors, forward or backward. The best replaces the
current entry if it is faster by 1% and by more than the noise. Every decision is written
immediately, so the next ``tune`` continues where this one stopped. float32, decoding and fp8 keep
the entries of ``configs.TABLE``, except for kernels whose entries do not depend on the dtype.
"""

from fastgpt.tuning.table import Line, Table, exported, summary
from fastgpt.tuning.tuner import tune
from fastgpt.tuning.workload import Workload

__all__ = ["Line", "Table", "Workload", "exported", "summary", "tune"]
