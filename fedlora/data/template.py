"""A chat template as it renders a row: where in the text the answers stand, and which words of it are the row's own."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from fedlora.data.conversations import Conversation
from fedlora.data.marks import LEVELS, PLANES, TOO_MANY, Level, Marked, Marks, marked_json
from fedlora.data.turns import REASONING, BadRow, Turn
from fedlora.data.vocabulary import Tokenizer, Vocabulary

REFUSED = "the chat template refuses this row"
CHANGED = "the chat template changes what this row says"
LEFT_OUT = "the chat template leaves out a turn"
NO_CALLS = "the chat template does not show tool calls"
SYSTEM = "the chat template does not show system turns"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text that is tokenized in one piece.

    Attributes:
        text: the whole.
        spans: (start, end) of what is trained, in characters, in order, at least one.
        bodies: (start, end) of texts of the row that are not trained, and may be cut if the row is too long.
        quoted: where special-token strings begin that are the row's own words.
        begun: the text holds what the tokenizer puts before a prompt, or the template decides that.
        ended: a token that ends the turn is the last that is trained.
        notes: what has to be said of this row; keys of NOTES.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    bodies: tuple[tuple[int, int], ...] = ()
    quoted: frozenset[int] = frozenset()
    begun: bool = True
    ended: bool = True
    notes: frozenset[str] = frozenset()


_ANSWER = "zq2"
"""An answer that no template writes itself."""


class Template:
    """The chat template of a base, at a date.

    Args:
        tokenizer: with a template.
        date: what the template sees as today, YYYY-MM-DD, midnight.
    """

    def __init__(self, tokenizer: Tokenizer, *, date: str) -> None:
        self.tokenizer, self.date = tokenizer, date
        self._sources: dict[bool, str | None] = {}
        self.dated = any(self._source(tools) is not None for tools in (False, True))
        x, y = Turn("user", "zq1", False), Turn("assistant", _ANSWER, True)
        written = self.shown([x, y, x])
        self.vocabulary = Vocabulary(tokenizer, written or "")
        self._knows_developer = "developer" in self._text(tools=False)
        self._arguments: Literal["text", "object"] | None = None
        with_header = self.shown([x], ask=True)
        asked, answered = self.shown([x]), self.shown([x, y]) or ""
        self.prompts = with_header is not None and with_header != asked
        begins = asked is not None and not self.prompts and answered.startswith(asked)
        self.header = answered[len(asked or "") :].partition(_ANSWER)[0] if begins else ""
        self.enders = {tokenizer.eos_token or "", *self._ends(answered, written or "")}

    def _ends(self, alone: str, followed: str) -> list[str]:
        """The token that ends an answer: the last one that stays when turns follow, or the first that there is.

        Args:
            alone: a chat that ends in it.
            followed: one in which a turn follows.
        """
        at = alone.rfind(_ANSWER) + len(_ANSWER)
        tokens = self.vocabulary.first(alone, at, frozenset())
        stays = [match[0] for match in tokens if followed.startswith(alone[: match.end()])]
        return stays[-1:] or [match[0] for match in tokens[:1]]

    # --- rendering ----------------------------------------------------------------------------------------------------

    def shown(self, turns: Sequence[Turn], tools: str = "", *, ask: bool = False, marks: Marks | None = None) -> str | None:
        """What the template makes of turns; None if it refuses them."""
        messages = [self._message(number, turn, marks) for number, turn in enumerate(turns)]
        offered = marked_json(json.loads(tools), marks, -1, "tools") if tools else None
        options: dict[str, Any] = {} if (source := self._source(bool(tools))) is None else {"chat_template": source}
        with suppress(Exception):  # templates raise whatever they like, and their errors may quote the row
            return str(
                self.tokenizer.apply_chat_template(messages, tools=offered, tokenize=False, add_generation_prompt=ask, **options)
            )
        return None

    def _text(self, *, tools: bool) -> str:
        with suppress(Exception):
            return self.tokenizer.get_chat_template(None, [{}] if tools else None)
        return ""

    def _source(self, tools: bool) -> str | None:
        """The template with a clock that stands still; None if it asks for no time."""
        if tools not in self._sources:
            text = self._text(tools=tools)
            self._sources[tools] = _clock(self.date) + text if "strftime_now" in text else None
        return self._sources[tools]

    def _message(self, number: int, turn: Turn, marks: Marks | None) -> dict[str, Any]:
        answer = turn.role == "assistant"

        def put(text: str, kind: str) -> str:
            return text if marks is None else marks.put(text, number, kind, answer=answer)

        role = "system" if turn.role == "developer" and not self._knows_developer else turn.role
        message: dict[str, Any] = {"role": role}
        if turn.text or not turn.calls:
            message["content"] = put(turn.text, "text")
        if turn.reasoning:
            message |= dict.fromkeys(REASONING, put(turn.reasoning, "reasoning"))
        if turn.calls:
            message["tool_calls"] = [self._call(call, number, marks) for call in json.loads(turn.calls)]
        if turn.name:
            message["name"] = put(turn.name, "name")
        if turn.call_id:
            message["tool_call_id"] = turn.call_id if marks is None else marks.quote(turn.call_id)
        return message

    def _call(self, call: dict[str, Any], number: int, marks: Marks | None) -> dict[str, Any]:
        function = call["function"]
        given = function["arguments"]
        if self._arguments is None:
            self._arguments = "object"  # while it is tried
            self._arguments = self._wanted()
        if self._arguments == "text":
            text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            given = text if marks is None else marks.put(text, number, "argument", answer=True)
        else:
            held = json.loads(given) if isinstance(given, str) else given
            given = marked_json(held, marks, number, "argument")
        name = function["name"] if marks is None else marks.put(function["name"], number, "call", answer=True)
        if marks is not None and "id" in call:
            call = {**call, "id": marks.quote(call["id"])}
        return {**call, "function": {"name": name, "arguments": given}}

    def _wanted(self) -> Literal["text", "object"]:
        """Whether the template takes arguments as text (then it shows them as they are) or as an object."""
        x = Turn("user", "x", False)
        call = [{"id": "call00001", "type": "function", "function": {"name": "f", "arguments": '{"k":  "v"}'}}]
        self._arguments = "text"
        shown = self.shown([x, Turn("assistant", "", True, calls=json.dumps(call))])
        return "text" if shown is not None and '{"k":  "v"}' in shown else "object"

    # --- rows ---------------------------------------------------------------------------------------------------------

    def rendered(self, c: Conversation) -> list[Rendered]:
        """The texts of a row: one, or one for each trained answer where the template shows earlier answers differently.

        Law: each text is a prefix of what the template makes of the turns up to its last trained answer.

        Raises:
            BadRow: no mask would be right.
        """
        try:
            return _Row(self, c.turns, c.tools).examples()
        except BadRow as err:
            why = str(err)
        except RecursionError:  # JSON in JSON in JSON
            why = TOO_MANY
        if why not in (REFUSED, SYSTEM) or c.turns[0].role not in ("system", "developer"):
            raise BadRow(why)
        system, user, *rest = c.turns
        if user.role != "user":
            raise BadRow(why)
        one = Turn("user", f"{system.text}\n\n{user.text}", False, name=user.name)
        return _Row(self, (one, *rest), c.tools, frozenset({"folded"})).examples()


class _Row:
    """One row while it is rendered."""

    def __init__(self, template: Template, turns: Sequence[Turn], tools: str, notes: frozenset[str] = frozenset()) -> None:
        self.template, self.tools, self.notes = template, tools, notes
        answers = [number for number, turn in enumerate(turns) if turn.trained]
        self.turns, self.answers = turns[: answers[-1] + 1], answers
        held = "".join([*(t.text + t.reasoning + t.calls + t.name for t in self.turns), tools])
        planes = [first for first, pattern in PLANES.items() if held.isascii() or not pattern.search(held)]
        if not planes:
            raise BadRow(TOO_MANY)
        self.plane = planes[0]

    def plain(self, count: int, *, ask: bool = False) -> str | None:
        return self.template.shown(self.turns[:count], self.tools, ask=ask)

    def marked(self, count: int, level: Level) -> Marked | None:
        marks = Marks(self.template.vocabulary, self.plane, level)
        text = self.template.shown(self.turns[:count], self.tools, marks=marks)
        return None if text is None else Marked.read(text, marks)

    def proved(self, count: int) -> Marked:
        """The first turns with as many marks as leave the text as it is."""
        plain = self.plain(count)
        if plain is None:
            raise BadRow(REFUSED)
        for level in LEVELS:
            found = self.marked(count, level)
            if found is not None and found.text == plain:
                return found
        raise BadRow(CHANGED)

    def examples(self) -> list[Rendered]:
        last = self.answers[-1]
        whole = self.proved(last + 1)
        spans, ended = [], True
        for number in self.answers:
            found = whole if number == last else self.marked(number + 1, whole.level)
            if found is None:
                return self.apart()
            span, ended = self.span(number, found)
            if found.text[: span[1]] != whole.text[: span[1]]:
                return self.apart()
            spans.append(span)
        return [self.made(whole, spans, self.answers, ended=ended)]

    def apart(self) -> list[Rendered]:
        """One text for each answer, as the model will see it: the answer last."""
        found = []
        for number in self.answers:
            shown = self.proved(number + 1)
            span, ended = self.span(number, shown)
            found.append(self.made(shown, [span], [number], ended=ended, notes=frozenset({"apart"})))
        return found

    # --- where an answer stands ---------------------------------------------------------------------------------------

    def span(self, number: int, shown: Marked) -> tuple[tuple[int, int], bool]:
        """(start, end) of the last turn: from where the template's prompt leaves off to the token that ends the turn.

        Returns:
            The span, and whether a token ends it.
        """
        own = shown.of(number, "text", "reasoning", "call", "argument")
        if self.turns[number].calls and shown.complete and not any(n in shown.ends for n in shown.of(number, "call")):
            raise BadRow(NO_CALLS)
        start = self._start(number, shown, own)
        ends = [(shown.ends[n], n) for n in own if n in shown.ends]
        if not ends and (shown.complete or not self.turns[number].calls):
            raise BadRow(LEFT_OUT)
        behind, mark = max(ends, default=(start, -1))
        trail = shown.known[mark].trail if ends else ""
        behind += len(trail) if shown.text.startswith(trail, behind) else 0
        end = self._end(shown, behind)
        return (start, end or behind), end is not None

    def _start(self, number: int, shown: Marked, own: list[int]) -> int:
        begins = [(shown.begins[n], n) for n in own if n in shown.begins]
        first = min(begins)[0] if begins else None
        if begins:
            lead = shown.known[min(begins)[1]].lead
            first = min(begins)[0] - (len(lead) if shown.text.endswith(lead, 0, min(begins)[0]) else 0)
        asked = self.plain(number, ask=True)
        if asked is not None and shown.text.startswith(asked + self.template.header):
            asked += self.template.header
        if asked is not None and shown.text.startswith(asked):
            return len(asked) if first is None else min(len(asked), first)
        if asked is not None and shown.complete:
            common = next((n for n, (a, b) in enumerate(zip(asked, shown.text, strict=False)) if a != b), len(shown.text))
            for match in self.template.vocabulary.added.finditer(asked):
                common = match.start() if match.start() < common < match.end() else common
            earlier = max((at for n, at in shown.ends.items() if shown.known[n].turn < number), default=0)
            if common >= earlier:
                return common if first is None else min(common, first)
        if first is None:
            raise BadRow(CHANGED)
        return first

    def _end(self, shown: Marked, behind: int) -> int | None:
        """Behind the token that ends the turn; None if there is none."""
        tokens = self.template.vocabulary.first(shown.text, behind, shown.quoted)
        if not tokens:
            return None
        for match in tokens:
            if match[0] in self.template.enders:
                return match.end()
        end = tokens[0].end()
        for match in tokens[1:]:
            end = match.end() if match.start() == end else end
        return end

    # --- what comes of it ---------------------------------------------------------------------------------------------

    def made(
        self, shown: Marked, spans: list[tuple[int, int]], trained: list[int], *, ended: bool, notes: frozenset[str] = frozenset()
    ) -> Rendered:
        bodies = []
        for n, mark in enumerate(shown.known):
            if mark.turn not in trained and mark.kind in ("text", "reasoning") and n in shown.begins and n in shown.ends:
                bodies.append((shown.begins[n], shown.ends[n]))
        missing = frozenset(self.missing(shown, trained))
        if shown.quoted:
            notes |= {"quoted"}
        return Rendered(shown.text, tuple(spans), tuple(sorted(bodies)), shown.quoted, True, ended, self.notes | notes | missing)

    def missing(self, shown: Marked, trained: list[int]) -> set[str]:
        """What the template leaves out of the row, as keys of NOTES.

        Raises:
            BadRow: a whole turn is missing, or calls, or an answer reads differently.
        """
        found = set()
        squashed = ""
        for n, mark in enumerate(shown.known):
            ended, turn = n in shown.ends, self.turns[mark.turn]
            if ended and shown.level == "ends":
                continue
            if ended and n in shown.begins:
                if mark.kind in ("text", "reasoning") and turn.role != "tool" and not _same(shown, n, turn, mark.kind):
                    if mark.turn in trained:
                        raise BadRow(CHANGED)
                    found.add("part")
                continue
            if mark.turn >= 0 and turn.trained and mark.turn not in trained:
                continue  # this answer has a text of its own
            if mark.kind == "text" and not ended and n not in shown.begins:
                raise BadRow(SYSTEM if turn.role in ("system", "developer") else LEFT_OUT)
            if mark.kind in ("call", "argument"):
                raise BadRow(NO_CALLS)
            squashed = squashed or "".join(shown.text.split())
            if mark.kind != "text" or "".join(turn.text.split()) not in squashed:  # the template may take it apart
                found.add(_MISSING[mark.kind])
        return found


def _same(shown: Marked, n: int, turn: Turn, kind: str) -> bool:
    """Between its marks stands the text, but for white space."""
    text = turn.text if kind == "text" else turn.reasoning
    here = shown.text[shown.begins[n] : shown.ends[n]]
    return here == text.strip() or "".join(here.split()) == "".join(text.split())


_MISSING = {"text": "part", "reasoning": "reasoning", "name": "name", "tools": "tools"}


def _clock(date: str) -> str:
    """A macro that stands before a template in place of its clock."""
    now = datetime.datetime.fromisoformat(date)
    plain = {f"%{x}": now.strftime(f"%{x}") for x in "aAbBcdHIjmMpSUwWxXyYfGuV"} | {"%Z": "", "%z": ""}
    short = {f"%-{x}": str(int(plain[f"%{x}"])) for x in "dmHIMSj"}
    more = {"%e": f"{now.day:2d}", "%F": date, "%D": now.strftime("%m/%d/%y"), "%T": "00:00:00", "%R": "00:00", "%h": plain["%b"]}
    steps = [("%%", "\0"), *(short | plain | more).items(), ("\0", "%")]
    calls = "".join(f".replace({json.dumps(a)}, {json.dumps(b)})" for a, b in steps)
    return "{%- macro strftime_now(format) -%}{{- format" + calls + " -}}{%- endmacro -%}"


NOTES = {
    "apart": "the chat template shows earlier answers differently once more turns follow: one example for each answer",
    "folded": "the chat template takes no system turn: its text stands before the first question",
    "quoted": "special-token strings in the text of the row are encoded as text (data.special_tokens)",
    "kept": "special-token strings in the text of the row are special tokens (data.special_tokens)",
    "reasoning": "the chat template leaves out the reasoning of an answer",
    "part": "the chat template leaves out a part of a text (such as what stands before </think>)",
    "name": "the chat template leaves out the name of a speaker",
    "tools": "the chat template leaves out tools, or a part of them",
    "rendered": "rendered already: special tokens are kept, none is put before or behind",
    "ended": "ends with the text of a token that ends a turn: no second one is added",
}
"""What a report says of rows, by the key that the code uses."""
