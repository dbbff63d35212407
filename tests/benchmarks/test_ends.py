"""The correlation between the ends of a fine-tune: what rows it is taken over."""

from alphatoken.pipeline.maths.batch import IGNORED
from benchmarks.quality.finetune import cut_responses


def test_a_response_is_cut_after_so_many_tokens_and_a_shorter_one_is_left_whole():
    rows = [
        ([5, 6, 7, 8, 9], [IGNORED, IGNORED, 7, 8, 9]),
        ([5, 6, 7], [IGNORED, 6, 7]),
        ([5, 6, 7, 8, 9], [IGNORED, 6, IGNORED, 8, 9]),  # a prompt of a second turn counts as well
    ]
    assert cut_responses(rows, 2) == [
        ([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8]),
        ([5, 6, 7], [IGNORED, 6, 7]),
        ([5, 6, 7], [IGNORED, 6, IGNORED]),
    ]
    assert cut_responses(rows, 9) == rows
