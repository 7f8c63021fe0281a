"""Which of our types may travel as channel payloads; every actor that sends or takes them imports this."""

from actors.episodes import Action, Group, Sampling, Segment, Turn
from channels.payload import register
from sim.contract import ChatMessage, TextObservation

for _type in (Action, ChatMessage, Group, Sampling, Segment, TextObservation, Turn):
    register(_type)
