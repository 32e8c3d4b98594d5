"""The sub-commands of `insighttag`."""
