"""Chat formats: conversations to token ids by templates that are data; control tokens are inserted by id."""

from ascendspeed.tokenization.chat.chat_format import ChatFormat
from ascendspeed.tokenization.chat.jinja_template import to_jinja
from ascendspeed.tokenization.chat.messages import (
    InvalidConversation,
    Message,
    ToolCall,
    read_messages,
    read_training_messages,
)
from ascendspeed.tokenization.chat.segments import PromptSegment, SegmentEncoder
from ascendspeed.tokenization.chat.stop_tokens import (
    control_token_ids,
    generation_config_stops,
    stop_token_ids,
)
from ascendspeed.tokenization.chat.template_files import template_name
from ascendspeed.tokenization.chat.templates import TEMPLATES, ChatTemplate, choose_template

__all__ = [
    "TEMPLATES",
    "ChatFormat",
    "ChatTemplate",
    "InvalidConversation",
    "Message",
    "PromptSegment",
    "SegmentEncoder",
    "ToolCall",
    "choose_template",
    "control_token_ids",
    "generation_config_stops",
    "read_messages",
    "read_training_messages",
    "stop_token_ids",
    "template_name",
    "to_jinja",
]
