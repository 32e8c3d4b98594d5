"""Media files on disk to pictures, frames and waveforms."""
