"""Prompts for the text encoders."""


def tokenize_prompt(tokenizer, prompt, max_sequence_length):
    """Token ids (B, max_sequence_length) int64 of a prompt or list of prompts, padded and cut to that length."""
    return tokenizer(
        prompt, padding="max_length", max_length=max_sequence_length, truncation=True, return_tensors="pt"
    ).input_ids
