"""From a base model to an assistant: dialogues, fine-tuning on their answers, a chat."""
