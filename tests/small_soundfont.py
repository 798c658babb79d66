"""A SoundFont of one instrument, a sine wave at middle C, made by hand: a few kilobytes for tests of sound."""

import struct
from pathlib import Path

import numpy as np

RATE = 22050
KEY = 60
HERTZ = 261.6256


def chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def listed(kind: bytes, *chunks: bytes) -> bytes:
    return chunk(b"LIST", kind + b"".join(chunks))


def text(value: str) -> bytes:
    return value.encode().ljust(20, b"\0")


def write_soundfont(path: Path, *, loudness: float = 0.5) -> Path:
    """SoundFont 2.01: one preset, one instrument, one looped sample of whole periods (sections 6 to 8 of its
    specification)."""
    periods = 200
    length = round(periods * RATE / HERTZ)
    wave = loudness * np.sin(2 * np.pi * periods * np.arange(length) / length)
    samples = np.concatenate([np.round(wave * 32767), np.zeros(46)]).astype("<i2").tobytes()
    loops, sample = 54, 53  # generators: sampleModes, sampleID
    bag = struct.pack("<HH", 0, 0)
    headers = text("sine") + struct.pack("<IIIIIBbHH", 0, length, 8, length - 8, RATE, KEY, 0, 0, 1)
    body = [
        listed(
            b"INFO", chunk(b"ifil", struct.pack("<HH", 2, 1)), chunk(b"isng", b"EMU8000\0"), chunk(b"INAM", b"sine\0")
        ),
        listed(b"sdta", chunk(b"smpl", samples)),
        listed(
            b"pdta",
            chunk(
                b"phdr",
                text("sine")
                + struct.pack("<HHHIII", 0, 0, 0, 0, 0, 0)
                + text("EOP")
                + struct.pack("<HHHIII", 0, 0, 1, 0, 0, 0),
            ),
            chunk(b"pbag", bag + struct.pack("<HH", 1, 0)),
            chunk(b"pmod", bytes(10)),
            chunk(b"pgen", struct.pack("<HH", 41, 0) + bytes(4)),
            chunk(b"inst", text("sine") + struct.pack("<H", 0) + text("EOI") + struct.pack("<H", 1)),
            chunk(b"ibag", bag + struct.pack("<HH", 2, 0)),
            chunk(b"imod", bytes(10)),
            chunk(b"igen", struct.pack("<HHHH", loops, 1, sample, 0) + bytes(4)),
            chunk(b"shdr", headers + text("EOS") + bytes(26)),
        ),
    ]
    path.write_bytes(chunk(b"RIFF", b"sfbk" + b"".join(body)))
    return path
