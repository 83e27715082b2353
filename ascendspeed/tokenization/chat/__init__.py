"""Conversations -> token ids, by templates that are data; control tokens are put by id, text is only ever text."""

from ascendspeed.tokenization.chat.chat_format import Chat
from ascendspeed.tokenization.chat.messages import (
    Call,
    Message,
    WrongMessage,
    read_answered,
    read_messages,
    short,
)
from ascendspeed.tokenization.chat.segments import Piece, PieceEncoder
from ascendspeed.tokenization.chat.stop_tokens import generation_stops, stop_set
from ascendspeed.tokenization.chat.templates import TEMPLATES, Template, choose

__all__ = [
    "TEMPLATES",
    "Call",
    "Chat",
    "Message",
    "Piece",
    "PieceEncoder",
    "Template",
    "WrongMessage",
    "choose",
    "generation_stops",
    "read_answered",
    "read_messages",
    "short",
    "stop_set",
]
