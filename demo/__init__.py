"""The demo: posts -> backbones -> features -> fusion -> daemon -> tags, in one command."""
