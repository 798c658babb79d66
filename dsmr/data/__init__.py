"""From folders of MIDI to corpora of whole pieces: tokenisers, vocabularies, prepared data sets, augmentation."""

from dsmr.data.corpus import Corpus
from dsmr.data.vocabulary import Vocabulary

__all__ = ["Corpus", "Vocabulary"]
