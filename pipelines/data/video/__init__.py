"""Files of video: opening, decoding in a child process, shots, measurements, fingerprints."""
