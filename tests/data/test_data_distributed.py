"""Two real processes under Lightning: nothing repeated or left out in evaluation, and the same training."""

import pytest

from qsd.data import DigitsData
from qsd.errors import QsdError
from tests.helpers.distributed import run_processes

pytestmark = pytest.mark.filterwarnings("ignore")


class FewDigits(DigitsData):
    """The first 21 images of each part: ten per process and one more for the first."""

    count = 21

    def __init__(self, batch_size):
        super().__init__(img_size=8, batch_size=batch_size)

    def load_part(self, part):
        source = super().load_part(part)
        return type(source)(source._images[: self.count], source.labels[: self.count], source._names[: self.count])


@pytest.mark.timeout(120)
def test_two_processes_see_what_one_sees(tmp_path):
    (one,) = run_processes(tmp_path / "one", 1, 10, FewDigits)
    two = run_processes(tmp_path / "two", 2, 5, FewDigits)
    # evaluation: every image once, though 21 do not divide by 2 and one process has a batch more
    for stage, repeats in (("val", 2), ("predict", 1)):
        assert len(one[stage]) == 21 * repeats
        assert sorted(one[stage]) == sorted(two[0][stage] + two[1][stage])
        assert [len(seen[stage]) for seen in two] == [11 * repeats, 10 * repeats]
    # training: the same images, augmented the same way, in the same step
    assert [len(seen["train"]) for seen in two] == [len(one["train"])] * 2 == [4, 4]
    for step in range(4):
        assert sorted(one["train"][step]) == sorted(two[0]["train"][step] + two[1]["train"][step])


@pytest.mark.timeout(120)
def test_fewer_images_than_processes_is_an_error_not_a_hang(tmp_path):
    class OneDigit(FewDigits):
        count = 1

    with pytest.raises(Exception, match=r"1 image\(s\) cannot be evaluated by 2 processes") as error:
        run_processes(tmp_path / "two", 2, 5, OneDigit)
    assert QsdError.__name__ in str(error.value) or isinstance(error.value, QsdError)
