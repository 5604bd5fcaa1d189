"""From a base model to an assistant: dialogues, rewards, reinforcement learning, chat."""
