"""What is seen of a file from outside, for people who compare two of them."""

import time


def seen_of_file(size: int, modified: float) -> str:
    """Size in bytes, and the time of the last change (seconds since 1970) in UTC."""
    return f"{size:,} bytes, {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(modified))} UTC"
