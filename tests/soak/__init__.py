"""Kills, damage, hostile files and full disks, and what comes of them. `make soak`"""
