"""``fastgpt reward`` and ``fastgpt rl``."""

import shlex

from rich.console import Console

from fastgpt.assistant.reward import RewardConfig, RewardTraining
from fastgpt.assistant.rl import ReinforcementLearning, RLConfig


def run_reward(config: RewardConfig, console: Console) -> None:
    """Raises as ``RewardTraining`` does."""
    RewardTraining(config, console).run()
    reward = shlex.quote(config.out_dir)
    console.print(f"saved {config.out_dir}. Learn by it: fastgpt rl --reward={reward}")


def run_rl(config: RLConfig, console: Console) -> None:
    """Raises as ``ReinforcementLearning`` does."""
    ReinforcementLearning(config, console).run()
    out_dir = shlex.quote(config.out_dir)
    console.print(f"saved {config.out_dir}. Talk to it: fastgpt sample --chat --out_dir={out_dir}")
