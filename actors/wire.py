"""Which of our types may travel as channel payloads; every actor that sends or takes them imports this."""

from actors.episodes import (
    Action,
    Group,
    PolicyReading,
    ReadingRequest,
    SampleRequest,
    Sampling,
    Segment,
    Turn,
    TurnRequest,
)
from channels.payload import register
from sim.contract import ChatMessage, TextObservation

for _type in (
    *(Action, Group, Sampling, Segment, Turn),
    *(SampleRequest, TurnRequest),
    *(PolicyReading, ReadingRequest),
    *(ChatMessage, TextObservation),
):
    register(_type)
