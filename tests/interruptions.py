"""Something that happens before one bytecode of chosen code: an exception, or a call from a finalizer or a handler."""

from collections.abc import Callable
from types import CodeType
from typing import Any


class Interruption:
    """A trace function that calls `action` before bytecode number `place` of the code that `is_chosen` holds for."""

    def __init__(self, place: int, action: Callable[[], None], is_chosen: Callable[[CodeType], bool]) -> None:
        self.left, self.action, self.is_chosen, self.is_over = place, action, is_chosen, False

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        if self.is_over or not self.is_chosen(frame.f_code):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left < 0:
                self.is_over = True
                self.action()
        return self


def interrupt() -> None:
    raise KeyboardInterrupt
