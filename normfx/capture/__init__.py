"""From a Dynamo graph or an exported program to the canonical graph."""
