"""ARM's published numbers, and the table that shows them beside ours."""

from adaptive_reasoning.report.console import aligned


def arm_rows(table: str) -> dict[str, dict[str, tuple]]:
    """Return {row: {benchmark: (accuracy in %, mean tokens)}} of a table: a name, seven accuracies, seven means."""
    names = ("csqa", "obqa", "gsm8k", "math", "svamp", "bbh", "aime25")
    rows = {}
    for line in table.strip().splitlines():
        name, accuracies, tokens = line.split("|")
        pairs = zip(accuracies.split(), tokens.split(), strict=True)
        rows[name.strip()] = {b: (float(a), int(n)) for b, (a, n) in zip(names, pairs, strict=True)}
    return rows


# ARM, arXiv 2505.20258v2: Table 1 (k = 1: pass@1, k = 8: maj@8), and Table 2 (settings of 7B, pass@1).
ARM = {
    "3b": arm_rows("""
        base, k=1     | 66.5 65.8 66.9 37.7 71.3 38.4  0.0 |  97 120 150  419  76 232 1393
        base, k=8     | 75.5 77.4 80.9 50.8 83.7 47.1  0.0 |  96 100 149  424  85 240 1544
        SFT, k=1      | 72.8 72.4 35.7 20.9 62.3 37.4  0.0 |  99 108 145  229 126 311  694
        SFT, k=8      | 75.5 77.4 56.0 27.6 74.7 43.5  0.0 |  97 103 132  231 108 309  537
        SFT+GRPO, k=1 | 79.7 79.0 88.7 66.6 92.0 52.6  6.7 | 425 501 788 1586 630 994 3027
        SFT+GRPO, k=8 | 80.3 80.0 91.4 74.0 94.7 56.2  6.7 | 429 506 802 1590 638 996 3247
        ARM, k=1      | 79.8 78.0 83.8 62.9 89.7 50.0  6.7 | 118 156 346 1013 264 436 2958
        ARM, k=8      | 80.1 78.0 90.8 72.8 95.0 53.8  6.7 | 123 169 359 1036 246 430 3083"""),
    "7b": arm_rows("""
        base, k=1     | 76.7 78.6 81.6 50.1 81.0 51.7  3.3 |  64  83 156  376  99 182  767
        base, k=8     | 82.0 86.4 89.9 64.7 89.7 62.0  3.3 |  66  74 156  370  92 183  881
        SFT, k=1      | 80.8 81.2 54.4 30.4 76.0 48.2  0.0 | 136 150 184  348 126 245 1239
        SFT, k=8      | 83.9 84.6 79.4 42.4 88.0 56.0  0.0 | 141 137 185  361 141 274 1023
        SFT+GRPO, k=1 | 83.1 82.2 92.8 79.4 93.7 64.3 16.7 | 491 651 739 1410 587 1133 3196
        SFT+GRPO, k=8 | 83.7 84.6 94.8 84.9 95.3 69.3 20.0 | 496 625 745 1415 586 1135 3145
        ARM, k=1      | 86.1 84.4 89.2 73.9 92.0 61.4 16.7 | 136 159 305  889 218 401 3253
        ARM, k=8      | 85.7 85.8 93.7 82.6 95.3 67.9 20.0 | 134 154 297  893 218 413 3392
        ARM, direct   | 84.1 81.8 22.9 23.1 67.0 44.7  0.0 |  10  10  11   13  11  21   12
        ARM, cot      | 81.3 77.4 85.0 70.9 86.7 49.7 10.0 |  33  35 124  633  66 101 2010
        ARM, code     | 84.4 81.6 84.2 65.9 88.3 57.9 10.0 | 140 147 285  559 182 344 1821
        ARM, long_cot | 84.0 87.4 91.8 77.2 94.3 66.9 20.0 | 259 294 426 1220 340 660 4130
        ARM, consensus| 85.8 87.0 92.9 78.4 95.7 66.4 20.0 | 228 260 777 2281 433 1039 7973"""),
    "14b": arm_rows("""
        base, k=1     | 79.9 83.8 84.9 52.7 84.7 56.8  3.3 |  56  60 132  335  77 139  611
        base, k=8     | 83.8 90.2 92.3 68.4 91.7 67.4  3.3 |  55  60 131  325  81 131  735
        SFT, k=1      | 81.8 88.0 62.6 37.4 84.0 53.5  0.0 | 155 140 161  276 152 254  527
        SFT, k=8      | 85.0 91.4 86.4 48.8 91.7 64.4  3.3 | 149 141 165  288 140 247  493
        SFT+GRPO, k=1 | 85.4 93.0 94.8 81.7 93.7 70.5 20.0 | 558 531 693 1805 565 945 4031
        SFT+GRPO, k=8 | 85.8 94.2 96.1 87.1 95.3 77.0 20.0 | 552 537 696 1810 565 943 3723
        ARM, k=1      | 85.3 91.8 92.5 79.1 93.3 66.6 20.0 | 146 128 294  903 212 420 3871
        ARM, k=8      | 85.6 91.8 96.3 86.4 95.7 72.1 23.3 | 145 134 293  910 189 415 3996"""),
}


def arm_table(rows: list[dict], size: str) -> str:
    """Return our rows and the paper's for the benchmarks that both have: accuracy %, tokens, share of Long CoT %.

    Args:
        rows: of evaluation.json; a result with "maj_accuracy" has a row of its own for the vote.
    """
    names = [b for b in dict.fromkeys(r["benchmark"] for r in rows) if b in ARM[size]["ARM, k=1"]]
    if not names:
        return "no benchmark here is in the paper's table"
    table = [["", *names]]
    for setting in dict.fromkeys(r["setting"] for r in rows):
        ours = {r["benchmark"]: r["result"] for r in rows if r["setting"] == setting}
        for title, key in ((setting, "accuracy"), (f"{setting}, vote", "maj_accuracy")):
            if key in ours[names[0]]:
                cells = [
                    f"{100 * ours[b][key]:.1f} / {ours[b]['mean_tokens']:.0f} / "
                    f"{100 * ours[b]['modes']['long_cot']['share']:.1f}"
                    for b in names
                ]
                table.append([f"here, {title}", *cells])
    for name, published in ARM[size].items():
        table.append([f"paper, {name}", *("{} / {}".format(*published[b]) for b in names)])
    return f"accuracy % / tokens / Long CoT %, paper {size}\n" + aligned(table)
