"""The only room that knows PEFT and transformers' Trainer."""
