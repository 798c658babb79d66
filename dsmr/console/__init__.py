"""What every program needs: errors said in a sentence, files written whole or not at all, devices, progress, Ctrl-C,
the frame of a picture. Knows nothing of music or models and imports no other room.
"""
