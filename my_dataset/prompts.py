"""Prompts as data: for generating images from one prompt, and for the text encoders."""
from torch.utils.data import Dataset


class PromptDataset(Dataset):
    """`num_samples` times the same prompt, as {"prompt", "index"}, to spread generation over batches and processes."""

    def __init__(self, prompt, num_samples):
        self.prompt = prompt
        self.num_samples = num_samples

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        return {"prompt": self.prompt, "index": index}


def tokenize_prompt(tokenizer, prompt, max_sequence_length):
    """Token ids (B, max_sequence_length) int64 of a prompt or list of prompts, padded and cut to that length."""
    return tokenizer(
        prompt, padding="max_length", max_length=max_sequence_length, truncation=True, return_tensors="pt"
    ).input_ids
