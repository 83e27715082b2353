"""Conversations -> token ids, by templates that are data; control tokens are put by id, text is only ever text."""

from ascendspeed.chat.messages import Call, Message, WrongMessage, read_answered, read_messages, short
from ascendspeed.chat.pieces import Piece, PieceEncoder
from ascendspeed.chat.rendering import Chat
from ascendspeed.chat.stops import generation_stops, stop_set
from ascendspeed.chat.templates import TEMPLATES, Template, choose

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
