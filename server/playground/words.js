/* Which words of two texts differ, by a longest common subsequence. */

const SEGMENTER = new Intl.Segmenter(undefined, { granularity: "word" });
// Cells of the table that is filled; beyond it the middle of two long texts counts as different as a whole.
const MAX_CELLS = 4_000_000;
// While texts grow they are compared with every frame.
const MAX_CELLS_GROWING = 10_000;

/** Words and punctuation marks of a text: { text, space, isWord }, where `space` is what follows `text`. */
export function wordsOf(text) {
  const words = [];
  for (const { segment, isWordLike } of SEGMENTER.segment(text)) {
    if (segment.trim() === "" && words.length > 0) {
      words.at(-1).space += segment;
    } else if (segment.trim() === "") {
      words.push({ text: "", space: segment, isWord: false });
    } else {
      words.push({ text: segment, space: "", isWord: Boolean(isWordLike) });
    }
  }
  return words;
}

/** For each word of both lists, whether the other one has it at this place: { first: [boolean], second: [boolean] }. */
export function common(first, second, maxCells = MAX_CELLS) {
  const marks = { first: first.map(() => false), second: second.map(() => false) };
  const same = (i, j) => first[i].text === second[j].text;
  const keep = (i, j) => {
    marks.first[i] = true;
    marks.second[j] = true;
  };
  let start = 0;
  while (start < first.length && start < second.length && same(start, start)) {
    keep(start, start);
    start += 1;
  }
  let [endFirst, endSecond] = [first.length, second.length];
  while (endFirst > start && endSecond > start && same(endFirst - 1, endSecond - 1)) {
    endFirst -= 1;
    endSecond -= 1;
    keep(endFirst, endSecond);
  }
  const [rows, columns] = [endFirst - start, endSecond - start];
  if (rows === 0 || columns === 0 || rows * columns > maxCells) {
    return marks;
  }
  // lengths[i][j]: longest common subsequence of what is left of both from i and j.
  const lengths = Array.from({ length: rows + 1 }, () => new Uint32Array(columns + 1));
  for (let i = rows - 1; i >= 0; i -= 1) {
    for (let j = columns - 1; j >= 0; j -= 1) {
      lengths[i][j] = same(start + i, start + j)
        ? lengths[i + 1][j + 1] + 1
        : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    }
  }
  for (let [i, j] = [0, 0]; i < rows && j < columns;) {
    if (same(start + i, start + j)) {
      keep(start + i, start + j);
      i += 1;
      j += 1;
    } else if (lengths[i + 1][j] >= lengths[i][j + 1]) {
      i += 1;
    } else {
      j += 1;
    }
  }
  return marks;
}

/**
 * Compare two texts.
 *
 * While one of them is still being written (`isFinal` false) what comes after their last common word is not marked: the
 * other text may yet say it.
 *
 * Returns { first, second, numFirst, numSecond }: pieces { text, isMarked } of each text, in order, without loss, and
 * the number of marked words.
 */
export function compared(firstText, secondText, isFinal = true) {
  const [first, second] = [wordsOf(firstText), wordsOf(secondText)];
  const marks = common(first, second, isFinal ? MAX_CELLS : MAX_CELLS_GROWING);
  const [one, two] = [pieces(first, marks.first, isFinal), pieces(second, marks.second, isFinal)];
  return { first: one.pieces, second: two.pieces, numFirst: one.numMarked, numSecond: two.numMarked };
}

/** Compares two texts that grow: anew only where one of them did. */
export class Comparison {
  #asked = [];
  #found = null;

  /** As `compared`; null while one of the texts is empty. The same object as before where nothing changed. */
  of(firstText, secondText, isFinal) {
    const asked = [firstText, secondText, isFinal];
    if (asked.some((value, index) => value !== this.#asked[index])) {
      this.#asked = asked;
      this.#found = firstText === "" || secondText === "" ? null : compared(...asked);
    }
    return this.#found;
  }
}

function pieces(words, isCommon, isFinal) {
  const end = isFinal ? words.length : isCommon.lastIndexOf(true) + 1;
  const found = [];
  let numMarked = 0;
  const add = (text, isMarked) => {
    if (text !== "" && found.at(-1)?.isMarked === isMarked) {
      found.at(-1).text += text;
    } else if (text !== "") {
      found.push({ text, isMarked });
    }
  };
  words.forEach(({ text, space, isWord }, index) => {
    const isMarked = index < end && !isCommon[index] && text !== "";
    numMarked += isMarked && isWord ? 1 : 0;
    add(text, isMarked);
    // Space between two marked words belongs to the mark, space after the last one does not.
    add(space, isMarked && index + 1 < end && !isCommon[index + 1]);
  });
  return { pieces: found, numMarked };
}
