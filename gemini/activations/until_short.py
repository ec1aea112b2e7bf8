"""The policy of those who name none: everything is kept for as long as memory suffices."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from ..errors import OffloadError, is_out_of_memory
from ..memory.non_model import Batch
from .counts import ActivationCounts
from .saving import KeepAll, Saving

logger = logging.getLogger(__name__)


class KeepUntilShort:
    """Keeps everything, without any hooks, until memory runs out and model data cannot make way any more.

    From the next forward on another policy has the say, for good.

    Parameters
    ----------
    make_other
        Makes that, when it is needed: its threads and its file cost nothing before.
    """

    def __init__(self, make_other: Callable[[ActivationCounts], Saving]) -> None:
        self._saving: Saving = KeepAll()
        self.counts = self._saving.counts
        self._make_other: Callable[[ActivationCounts], Saving] | None = make_other
        """None once it has been asked."""
        self._is_to_switch = False

    @property
    def keeps_until_short(self) -> bool:
        return self._make_other is not None and not self._is_to_switch

    def ran_short(self, others_help: bool) -> bool:
        if self._make_other is None:
            return self._saving.ran_short(others_help)
        self._is_to_switch = self._is_to_switch or not others_help
        return self._is_to_switch

    def of_call(self) -> AbstractContextManager[object]:
        if self._is_to_switch:
            self._switch()
        return self._saving.of_call()

    def _switch(self) -> None:
        """Not when memory has run out, but when a forward begins, and what has failed is gone."""
        make_other, self._make_other, self._is_to_switch = self._make_other, None, False
        assert make_other is not None
        try:
            self._saving = make_other(self.counts)
        except Exception as error:
            if not (isinstance(error, OffloadError) or is_out_of_memory(error)):
                raise
            logger.warning("memory has run out, and what forwards save has no place below it: %s", error)
            return
        self.counts.switched()
        logger.warning(
            "memory has run out: from now on what each block saves for backward is kept, moved or computed again as "
            "memory demands (activation_policy='auto'). The numbers stay the same. With activation_policy='auto' it "
            "begins at once; with 'keep' training would end here"
        )

    def begin(self, batch: Batch) -> None:
        self._saving.begin(batch)

    def rest(self, seconds: float = 0.0) -> None:
        self._saving.rest(seconds)

    def close(self) -> None:
        self._make_other, self._is_to_switch = None, False
        self._saving.close()
