"""What a tokenized example's responses say."""


def responses(tokenizer, example):
    """The text of each run of response tokens."""
    runs, current = [], []
    for label in [*example.labels, -100]:
        if label != -100:
            current.append(label)
        elif current:
            runs.append(tokenizer.decode(current, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            current = []
    return runs
